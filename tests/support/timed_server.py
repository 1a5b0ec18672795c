"""A server with known timing, faults included, that notes when it really sent what. Served in the test's own loop.

Behaviour is asked for in the request's body, under "script": {"ttft": s, "itl": s, "tokens": n, "fault": name,
"after": n, "score": x, ...}; a class of traffic puts it there. "raw" is the whole body of an answer as it is sent.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Served:
    """One request as the server saw it; times of `time.perf_counter()`."""

    body: dict[str, Any]
    headers: Mapping[str, str]
    arrived: float
    written: list[float] = field(default_factory=list)
    done: float = 0.0
    gone: bool = False


class Scripted:
    """Counts, keeps and answers requests. `gate` may hold a request back before it is answered."""

    def __init__(self, script: dict[str, Any] | None = None) -> None:
        self.served: list[Served] = []
        self.default = script or {}
        self.gate: Callable[[int], Any] | None = None
        self.url = ""
        self.retry_after = "0.05"

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Scripted"]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_get("/v1/models", self.models)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "scripted"}]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        served = Served({}, request.headers, time.perf_counter())
        self.served.append(served)
        number = len(self.served) - 1
        served.body = await request.json()
        script = self.default | served.body.get("script", {})
        fault = script.get("fault")
        if self.gate is not None:
            await self.gate(number)
        if isinstance(fault, int):
            headers = {"Retry-After": self.retry_after} if fault == 429 else {}
            error = {"error": {"message": f"scripted {fault}", "code": None}}
            return web.json_response(error, status=fault, headers=headers)
        if fault == "drop":
            request.transport.close()
            return web.Response()
        await asyncio.sleep(script.get("ttft", 0.0))
        if "raw" in script and not served.body.get("stream"):
            return web.Response(text=script["raw"], content_type="application/json")
        if not served.body.get("stream"):
            await asyncio.sleep(script.get("itl", 0.0) * (script.get("tokens", 1) - 1))
            response = web.json_response(self.whole(script, served.body))
            served.done = time.perf_counter()
            return response
        try:
            return await self.stream(request, served, script)
        except (ConnectionError, asyncio.CancelledError):
            served.gone = True
            raise

    async def stream(self, request: web.Request, served: Served, script: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if "raw" in script:
            await response.write(script["raw"].encode())
            return response
        chat = "messages" in served.body
        fault, after = script.get("fault"), script.get("after", 1)

        async def event(data: Any) -> None:
            await response.write(b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n")

        if chat:
            await event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await response.write(b": a comment that keeps the connection alive\n\n")
        for i in range(script.get("tokens", 1)):
            if i:
                await asyncio.sleep(script.get("itl", 0.0))
            if fault in ("error", "cut", "garbage", "hang") and i == after:
                if fault == "error":
                    await event({"error": {"message": "scripted mid-stream error", "code": "engine_unavailable"}})
                    await event(b"[DONE]")
                elif fault == "garbage":
                    await event(b"{not json")
                elif fault == "hang":
                    await asyncio.sleep(3600)
                return response
            served.written.append(time.perf_counter())
            await event({"choices": [{"index": 0, **({"delta": {"content": "w "}} if chat else {"text": "w "})}]})
        closing = {"index": 0, "finish_reason": "stop", **({"delta": {}} if chat else {"text": ""})}
        await event({"choices": [closing]})
        if not script.get("no_usage"):
            await event({"choices": [], "usage": self.usage(script), **self.alignment(script)})
        served.done = time.perf_counter()
        if fault != "no_done":
            await event(b"[DONE]")
        return response

    def usage(self, script: dict[str, Any]) -> dict[str, int]:
        return {"prompt_tokens": 7, "completion_tokens": script.get("tokens", 1)}

    def alignment(self, script: dict[str, Any]) -> dict[str, Any]:
        if "score" not in script:
            return {}
        tokens, score = script.get("tokens", 1), script["score"] + script.get("spread", 0.0) * random.gauss()
        return {
            "alignment": {
                "config": {"guide": {"name": "best_of_n", "n": 4}},
                "choices": [
                    {"index": 0, "score": score, "rewards": {"length": score}, "stopped_by": None}
                ],
                "spend": {
                    "tokens_generated": 4 * tokens, "tokens_accepted": tokens, "tokens_discarded": 3 * tokens,
                    "generation_s": 0.6, "scoring_s": 0.3, "waiting_s": 0.1, "total_s": 1.0,
                },
            }
        }  # fmt: skip

    def whole(self, script: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        text = "w " * script.get("tokens", 1)
        choice = {"message": {"content": text}} if "messages" in body else {"text": text}
        answer = {"choices": [{"index": 0, "finish_reason": "stop", **choice}], "usage": self.usage(script)}
        return answer | self.alignment(script)
