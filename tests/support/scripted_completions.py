"""A scripted vLLM server for a remote policy: /tokenize, and /v1/completions that counts on from the prompt's end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer


class ScriptedCompletions:
    """Continues [..., t] with t + 1, t + 2, ... unless `fault` does something else; `seen` keeps the bodies.

    offset: added to every token id of /tokenize; anything but 0 is another tokenizer.
    """

    def __init__(self, encode: Callable[[str], list[int]], *, key: str | None = None) -> None:
        self.encode = encode
        self.key = key
        self.offset = 0
        self.fault: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None
        self.seen: list[dict[str, Any]] = []
        self.running = 0
        self.given_up = 0
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._complete)
        self._server = TestServer(app)

    async def __aenter__(self) -> "ScriptedCompletions":
        await self._server.start_server()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._server.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    async def _models(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"data": [{"id": "aligned-model", "max_model_len": 512}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": [token + self.offset for token in self.encode(body["prompt"])]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        self.running += 1
        try:
            if self.fault is not None and (answer := await self.fault(request)) is not None:
                return answer
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        finally:
            self.running -= 1
        last = body["prompt"][-1]
        ids = [last + 1 + i for i in range(body["max_tokens"])]
        choice = {"index": 0, "text": " ".join(map(str, ids)), "finish_reason": "length", "stop_reason": None}
        return web.json_response({"choices": [{**choice, "token_ids": ids, "prompt_token_ids": body["prompt"]}]})
