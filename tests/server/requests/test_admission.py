"""Admission: what runs, waits and is refused, in which order, and that nothing is lost or leaked."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fakes import ScriptedEngine, make_state
from serving import serving

from guiderail.guides.core.errors import DeadlinePassed
from guiderail.server.metrics import Metrics
from guiderail.server.openai_errors import ApiError
from guiderail.server.requests.admission import Admission
from guiderail.server.settings import OperatorLimits


def admission(rows: int = 8, **limits: Any) -> Admission:
    return Admission(OperatorLimits(**limits), rows, Metrics("fake"))


class Work:
    """Requests that hold their slot until they are let go."""

    def __init__(self, door: Admission) -> None:
        self.door = door
        self.running: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, name: str, rows: int, tokens: int = 10, **more: Any) -> None:
        async def work() -> None:
            async with self.door.slot(rows, tokens, **more):
                self.running.append(name)
                await self._ends[name].wait()
                self.running.remove(name)

        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(work())
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_what_fits_runs_at_once_and_the_rest_waits_in_order() -> None:
    work = Work(admission(8))
    for name in "abcd":
        await work.start(name, 3)  # 6 of 8 rows are for wide requests
    assert work.running == ["a", "b"]
    assert work.door.waiting == 2
    assert work.door.waiting_tokens == 20
    await work.end("b")
    assert work.running == ["a", "c"]
    await work.end("a")
    await work.end("c")
    await work.end("d")
    assert work.door.waiting == 0


async def test_wide_requests_leave_rows_to_narrow_ones() -> None:
    work = Work(admission(8))
    await work.start("wide", 6)
    await work.start("wider", 6)
    for i in range(3):
        await work.start(f"n{i}", 1)
    assert work.running == ["wide", "n0", "n1"]
    await work.end("n0")
    assert work.running == ["wide", "n1", "n2"]


async def test_a_request_wider_than_the_engine_runs_and_narrow_ones_beside_it() -> None:
    work = Work(admission(8))
    await work.start("huge", 64)
    await work.start("n", 1)
    await work.start("wide", 2)
    assert work.running == ["huge", "n"]
    await work.end("huge")
    assert work.running == ["n", "wide"]


async def test_smaller_priority_goes_first() -> None:
    work = Work(admission(1))
    await work.start("a", 1)
    await work.start("late", 1, priority=5)
    await work.start("b", 1)
    await work.end("a")
    assert work.running == ["b"]
    await work.end("b")
    assert work.running == ["late"]


@pytest.mark.parametrize("limits", [{"max_queue": 1}, {"max_queue_tokens": 15}])
async def test_beyond_the_bound_is_refused_with_a_time_to_come_back(limits: dict[str, int]) -> None:
    work = Work(admission(1, **limits))
    await work.start("a", 1)
    await work.start("b", 1)
    with pytest.raises(ApiError) as failure:
        async with work.door.slot(1, 10):
            pass
    assert failure.value.status == 429
    assert failure.value.retry_after_s is not None
    assert 1 <= failure.value.retry_after_s <= 120
    assert failure.value.body["error"]["code"] == "overloaded"
    await work.end("a")
    assert work.running == ["b"]


async def test_retry_after_follows_the_measured_speed() -> None:
    work = Work(admission(1, max_queue_tokens=1000))
    work.door.finished(tokens=100, seconds=1.0, rows=1)
    await work.start("a", 1, tokens=400)
    await work.start("b", 1, tokens=900)
    with pytest.raises(ApiError) as failure:
        async with work.door.slot(1, 500):
            pass
    assert failure.value.retry_after_s == 11  # (900 + 400 / 2) / 100


async def test_what_cannot_begin_before_its_deadline_is_refused_at_once() -> None:
    work = Work(admission(1))
    work.door.finished(tokens=10, seconds=1.0, rows=1)
    await work.start("a", 1, tokens=1000)
    await work.start("b", 1, deadline=time.monotonic() + 40)
    assert work.tasks["b"].done(), "it does not wait for its deadline"
    with pytest.raises(ApiError, match="deadline"):
        await work.tasks["b"]
    assert work.door.waiting == 0


async def test_a_deadline_that_passes_in_the_queue_ends_the_wait() -> None:
    work = Work(admission(1))
    await work.start("a", 1)
    with pytest.raises(DeadlinePassed, match="waited"):
        async with work.door.slot(1, 10, deadline=time.monotonic() + 0.05):
            pass
    assert work.door.waiting == 0


async def test_cancelled_waiters_leave_no_trace() -> None:
    work = Work(admission(2))
    await work.start("a", 1)
    await work.start("b", 1)
    await work.start("c", 1)
    await work.start("d", 1)
    work.tasks["c"].cancel()
    await asyncio.gather(work.tasks["c"], return_exceptions=True)
    assert work.door.waiting == 1
    await work.end("a")
    assert work.running == ["b", "d"]
    await work.end("b")
    await work.end("d")
    await work.start("e", 2)
    assert work.running == ["e"]


async def test_a_waiter_cancelled_in_the_moment_it_is_admitted_gives_its_rows_back() -> None:
    door = admission(1)
    holder = door.slot(1, 10)
    await holder.__aenter__()

    async def wait() -> None:
        async with door.slot(1, 10):
            await asyncio.sleep(10)

    waiter = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    await holder.__aexit__(None, None, None)  # admits the waiter, which has not run yet
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    async with asyncio.timeout(1), door.slot(1, 10):
        pass


def count(metrics: str, name: str, **labels: str) -> float:
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith(f"guiderail:{name}") and all(f'{k}="{v}"' in line for k, v in labels.items())
    )


async def test_over_http_the_rest_gets_429_and_every_request_is_counted_once() -> None:
    engine = ScriptedEngine(step_s=0.05)
    state = make_state(engine, max_num_seqs=2, limits={"max_queue": 3, "reserved_share": 0})
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    async with serving(state) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        post: Callable[..., Any] = lambda **more: client.post("/v1/chat/completions", json=body | more)  # noqa: E731
        answers = await asyncio.gather(*(post(stream=bool(i % 2)) for i in range(12)))
        codes = [a.status_code for a in answers]
        assert sorted(set(codes)) == [200, 429]
        assert codes.count(200) == 5
        refused = next(a for a in answers if a.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert (await post(priority=-1)).status_code == 400
        assert (await post()).status_code == 200
        metrics = (await client.get("/metrics")).text
    assert count(metrics, "requests_total", outcome="success") == 6
    assert count(metrics, "requests_total", outcome="overloaded") == 7
    assert count(metrics, "requests_total", outcome="rejected") == 1
    assert count(metrics, "num_requests_running") == 0
    assert count(metrics, "num_requests_waiting") == 0
    assert count(metrics, "request_queue_time_seconds_count") == 6
    assert engine.peak == 2


async def test_a_client_that_leaves_the_queue_is_counted_as_cancelled() -> None:
    engine = ScriptedEngine(step_s=0.1)
    state = make_state(engine, max_num_seqs=1, limits={"reserved_share": 0})
    body = {"messages": [{"role": "user", "content": "hi"}]}
    async with serving(state) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        first = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await asyncio.sleep(0.1)
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/chat/completions", json=body, timeout=0.1)
        assert (await first).status_code == 200
        await asyncio.sleep(0.1)
        metrics = (await client.get("/metrics")).text
    assert count(metrics, "requests_total", outcome="cancelled") == 1
    assert count(metrics, "requests_total", outcome="success") == 1
