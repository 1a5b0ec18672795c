"""Shutdown: new work is refused, running work gets its time, and what is left is told why it ends."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fakes import Faulty, ScriptedEngine, make_state
from raw_http import Raw, exchange, post
from virtual_time import in_virtual_time
from waiting import until

from guiderail.server.api.app import create_app
from guiderail.server.api.listener import Listener

PATH = "/v1/chat/completions"


def body(stream: bool, tokens: int) -> bytes:
    message = {"role": "user", "content": "q"}
    return json.dumps({"messages": [message], "max_tokens": tokens, "stream": stream, "seed": 10}).encode()


@asynccontextmanager
async def listening(state: Any) -> AsyncIterator[tuple[str, asyncio.Event, "asyncio.Task[None]"]]:
    """A server with its own listener; gives its URL, what stops it, and the task that ends with it."""
    listener, stop = Listener("127.0.0.1", 0), asyncio.Event()
    task = asyncio.create_task(listener.run(create_app(state), state, stop, lambda text: None))
    while True:
        try:
            if (await exchange(listener.url, b"GET /ready HTTP/1.1\r\n\r\n")).status:
                break
        except OSError:
            await asyncio.sleep(0.01)
    try:
        yield listener.url, stop, task
    finally:
        stop.set()
        await task


@in_virtual_time
async def test_work_that_ends_in_time_is_finished_and_new_work_is_refused() -> None:
    engine = ScriptedEngine(lambda seed: ["w"] * 50, step_s=0.1)
    state = make_state(engine, drain_timeout_s=10)
    async with listening(state) as (url, stop, task), Raw(url) as raw, Raw(url) as idle:
        await raw.send(post(PATH, body(False, 50)))
        await until(lambda: engine.num_running() == 1)
        stop.set()
        await until(lambda: state.shutdown.begun)
        refused = await exchange(url, post(PATH, body(False, 1)))  # it still listens, so that clients are told
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert refused.headers["connection"] == "close"
        assert int(refused.headers["retry-after"]) > 0
        await idle.send(post("/v1/rewards/score", b"{}"))
        assert (await idle.answer()).error["code"] == "shutting_down"
        ready = await exchange(url, b"GET /ready HTTP/1.1\r\n\r\n")
        assert (ready.status, json.loads(ready.body)) == (503, {"status": "shutting down"})
        assert (await exchange(url, b"GET /health HTTP/1.1\r\n\r\n")).status == 200
        answer = await raw.answer()
        assert answer.status == 200
        assert json.loads(answer.body)["usage"]["completion_tokens"] == 50
        await task
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await exchange(url, b"GET /health HTTP/1.1\r\n\r\n")


@in_virtual_time
async def test_what_does_not_end_in_time_is_told_so() -> None:
    engine = ScriptedEngine(lambda seed: ["w"] * 500, step_s=1.0)
    state = make_state(engine, {"hangs": Faulty("hang")}, drain_timeout_s=7)
    score = b'{"inputs": [{"messages": [{"role": "user", "content": "q"}], "answers": ["1"]}], "rewards": ["hangs"]}'
    async with listening(state) as (url, stop, task):
        raws = [Raw(url) for _ in range(4)]
        for each in raws:
            await each.__aenter__()
        streamed, whole, scored, sending = raws
        await streamed.send(post(PATH, body(True, 500)))
        await whole.send(post(PATH, body(False, 500)))
        await scored.send(post("/v1/rewards/score", score))
        await sending.send(post(PATH, body(False, 500))[:-3])
        await until(lambda: engine.num_running() == 2 and state.metrics.in_flight == 3)
        await asyncio.sleep(5)
        began = asyncio.get_running_loop().time()
        stop.set()
        answers = await asyncio.gather(*(each.answer() for each in raws))
        took = asyncio.get_running_loop().time() - began
        assert 7 <= took < 8
        for answer in answers[1:]:
            assert (answer.status, answer.error["code"]) == (503, "shutting_down")
            assert answer.headers["connection"] == "close"
        events = answers[0].body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert sum('"content":"w"' in event for event in events) >= 5
        assert answers[0].status == 200
        for each in raws:
            assert await each.closed() == b""
        await task
        assert engine.num_running() == state.metrics.in_flight == 0
        for each in raws:
            await each.__aexit__()


async def test_a_client_that_does_not_read_does_not_keep_the_server() -> None:
    engine = ScriptedEngine(lambda seed: ["x" * 10_000] * 100_000, max_model_len=200_000)
    state = make_state(engine, drain_timeout_s=0.1)
    async with listening(state) as (url, stop, task), Raw(url) as raw:
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await raw.send(post(PATH, body(True, 100_000)))
        await until(lambda: engine.num_running() == 1)
        stop.set()
        await asyncio.wait_for(task, 60)
        assert engine.num_running() == 0


async def test_without_work_it_stops_at_once() -> None:
    state = make_state(ScriptedEngine(), drain_timeout_s=3600)
    async with listening(state) as (url, stop, task), Raw(url):
        stop.set()
        await asyncio.wait_for(task, 60)


async def test_ready_says_what_is_missing() -> None:
    class Gone(Faulty):
        """A reward whose process has died."""

        up = False

    rewards: dict[str, Any] = {"fine": Faulty()}
    for engine, more, words in (
        (ScriptedEngine(), {}, "ready"),
        (ScriptedEngine(up=False), {}, "the engine is down"),
        (ScriptedEngine(silent=True), {}, "the engine does not answer"),
        (ScriptedEngine(), {"gone": Gone()}, "down: reward gone"),
    ):
        served = make_state(engine, rewards | more)
        transport = httpx.ASGITransport(create_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            ready = await client.get("/ready")
            assert ready.status_code == (200 if words == "ready" else 503)
            assert ready.json()["status"].startswith(words)
            assert (await client.get("/health")).status_code == 200
