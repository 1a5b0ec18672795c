"""Serves a server state with uvicorn on a free port, inside the test's own event loop."""

import asyncio
import socket
from dataclasses import dataclass

import torch
import uvicorn

from guiderail.server.api.app import create_app
from guiderail.server.api.connection import uvicorn_config
from guiderail.server.state import ServerState


@dataclass(frozen=True)
class Live:
    """A running server."""

    url: str
    state: ServerState


def engine_dtype() -> str:
    """The dtype in which tests that compare answers run their engine: float32 on every CPU, also where `auto` is bfloat16.

    With matrix tiles bfloat16 products round differently with the number of rows in a step, so that the same request
    may end otherwise beside others or over a cached prompt.
    """
    return "auto" if torch.cuda.is_available() else "float32"


class serving:
    """Serves a state with uvicorn on a free port of 127.0.0.1 for the time of the block; gives the URL."""

    def __init__(self, state: ServerState) -> None:
        self._server = uvicorn.Server(uvicorn_config(create_app(state), state.settings))

    async def __aenter__(self) -> str:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._task = asyncio.create_task(self._server._serve([self._socket]))
        while not self._server.started:
            await asyncio.sleep(0.01)
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    async def __aexit__(self, *error: object) -> None:
        self._server.should_exit = True
        await self._task
        self._socket.close()
