"""Common ground of scripted model servers: an address, the list of models behind a key, and faults on order."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Self

from aiohttp import web
from aiohttp.test_utils import TestServer


class ScriptedServer:
    """A server on a port of its own; `seen` keeps the bodies of the requests that `faulted` is asked about.

    fault: called with such a request; None from it means go on. running, peak: such requests in it, now and at most.
    """

    def __init__(self, models: tuple[str, ...], longest: int, key: str | None) -> None:
        self.models = models
        self.longest = longest
        self.key = key
        self.fault: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None
        self.seen: list[dict[str, Any]] = []
        self.running = self.peak = self.given_up = 0
        self.app = web.Application()
        self.app.router.add_get("/v1/models", self._models)
        self._server = TestServer(self.app)

    async def __aenter__(self) -> Self:
        await self._server.start_server()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._server.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    async def faulted(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        """Response of the fault, if there is one that responds."""
        self.seen.append(body)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self.fault(request) if self.fault is not None else None
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        finally:
            self.running -= 1

    async def _models(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"data": [{"id": name, "max_model_len": self.longest} for name in self.models]})
