"""Where the server listens: the address is taken before the engine starts, and answers once there is what to serve.

A port already in use is reported immediately, and no process that the engine starts can take it meanwhile. Until
`Listener.run` connections are refused, as health checks expect.
"""

import asyncio
import resource
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.api.connection import uvicorn_config
from guiderail.server.state import ServerState

OPEN_FILES = 65_536


class Listener:
    """The sockets of a host and port (0: any free one), bound. Raises GuiderailError if they can't be had."""

    def __init__(self, host: str, port: int) -> None:
        self.port = port
        self._host = host
        self._sockets: list[socket.socket] = []
        try:
            for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
                family, kind, protocol, _, address = found
                self._sockets.append(bound := socket.socket(family, kind, protocol))
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart waits for old connections
                if family == socket.AF_INET6:
                    bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
                bound.bind((address[0], self.port, *address[2:]))
                self.port = bound.getsockname()[1]
        except OSError as error:
            self.close()
            raise self._refusal(error) from error

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self.port}"

    async def run(self, app: FastAPI, state: ServerState, stop: asyncio.Event, say: Callable[[str], None]) -> None:
        """Serve until `stop` is set; requests in flight then get the drain time. Raises GuiderailError."""
        server = uvicorn.Server(uvicorn_config(app, state.settings))
        serving = asyncio.create_task(server._serve(self._sockets))  # `serve` would take the signals
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if stop.is_set():
            say("finishing requests in flight")
            await state.shutdown.drain(state.settings.drain_timeout_s)
        server.should_exit = True
        try:
            await serving
        except OSError as error:  # another process that had bound the address too was the first to listen
            raise self._refusal(error) from error

    def close(self) -> None:
        """Give the address back."""
        for each in self._sockets:
            each.close()

    def _refusal(self, error: OSError) -> GuiderailError:
        return GuiderailError(f"cannot listen on {self.url}: {error.strerror}; choose with --host and --port")


def raise_open_files() -> None:
    """Let this process open as many files as it may: a connection is one, and the soft limit is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
