"""Keep the schedule: send the plan's requests when they are due and gather their records.

Open loop (a finite rate): requests go out when they are due, however slow the server is; with a cap on concurrency
they wait here for a free place, and that wait counts. Closed loop (a cap and no rate): that many users, each of whom
sends as soon as the last answer ended, which is then the scheduled time; after a 429 a user first waits for as long as
Retry-After says.
"""

import asyncio
import gc
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

import numpy as np

from guiderail.loadtest.client.http import Client
from guiderail.loadtest.load.arrivals import Ramp, Times, arrival_times
from guiderail.loadtest.load.plan import Call, Plan
from guiderail.loadtest.report.records import Outcome, Record

LEAD_S = 0.02  # between making the schedule and its time 0, so that the first request is not late already


@dataclass(frozen=True, slots=True)
class Load:
    """Amount and rate of what is sent. `count` or `duration_s` must be given."""

    rate: float | Ramp = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    count: int | None = None
    duration_s: float | None = None

    @property
    def closed(self) -> bool:
        """True if the next request waits for an answer and not for a time."""
        return self.rate == math.inf and self.max_concurrency is not None

    @property
    def offered_rps(self) -> float | None:
        """Mean rate of the schedule in requests/s; None if there is none."""
        if isinstance(self.rate, Ramp):
            return self.rate.total(1.0)
        return None if math.isinf(self.rate) else self.rate


@dataclass(slots=True)
class Run:
    """Records of a load. `start` is time 0 of the schedule in `time.perf_counter()`."""

    load: Load
    start: float
    date: datetime
    records: list[Record] = field(default_factory=list)
    duration_s: float = 0.0
    interrupted: bool = False


class Watcher(Protocol):
    """Observer that is told of every request as it goes."""

    def sent(self, record: Record) -> None:
        """Note a request that goes out now."""

    def ended(self, record: Record) -> None:
        """Note a request that has its outcome."""

    def close(self) -> None:
        """End the display: the run is over."""


class Unwatched:
    """Watches nothing."""

    def sent(self, record: Record) -> None:
        """Do nothing."""

    def ended(self, record: Record) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


async def run_load(
    client: Client,
    plan: Plan,
    load: Load,
    *,
    seed: int,
    watcher: Watcher | None = None,
    stop: asyncio.Event | None = None,
) -> Run:
    """Send a load and wait until every request has ended. Setting `stop` ends it at once: nothing more is sent,
    and what is in flight is cancelled."""
    gc.collect()
    gc.freeze()  # a full collection in the middle would look like latency
    run = Run(load, time.perf_counter() + LEAD_S, datetime.now(UTC))
    sender = _Sender(client, plan, run, watcher or Unwatched())
    rng = np.random.default_rng([seed, 2**32])
    work = asyncio.ensure_future(sender.closed() if load.closed else sender.open(_times(load, rng)))
    stopping = asyncio.ensure_future((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        run.interrupted = not work.done()
        if work.done():
            work.result()
    finally:
        for task in (work, stopping):
            task.cancel()
        await asyncio.gather(work, stopping, return_exceptions=True)
        gc.unfreeze()
    run.duration_s = max(1e-6, time.perf_counter() - run.start)
    run.records.sort(key=lambda record: record.index)
    return run


async def warm_up(client: Client, plan: Plan, count: int, max_concurrency: int | None) -> list[Record]:
    """Send requests that are not measured; nobody hangs up on them."""
    load = Load(max_concurrency=max_concurrency or min(count, 16), count=count)
    sender = _Sender(client, plan, Run(load, time.perf_counter(), datetime.now(UTC)), Unwatched(), hang_ups=False)
    await sender.closed()
    return sender.run.records


def _times(load: Load, rng: np.random.Generator) -> Times:
    return arrival_times(rng, rate=load.rate, burstiness=load.burstiness, count=load.count, duration_s=load.duration_s)


class _Sender:
    def __init__(self, client: Client, plan: Plan, run: Run, watcher: Watcher, *, hang_ups: bool = True) -> None:
        self.run = run
        self._client, self._plan, self._watcher, self._hang_ups = client, plan, watcher, hang_ups
        cap = run.load.max_concurrency
        self._place = nullcontext() if cap is None else asyncio.Semaphore(cap)

    async def open(self, times: Times) -> None:
        """Send at given seconds after the start."""
        async with asyncio.TaskGroup() as tasks:
            for seconds in times:
                call, due = self._call(), self.run.start + float(seconds)
                await _until(due)
                tasks.create_task(self._in_place(call, due))

    async def closed(self) -> None:
        """Keep as many requests in flight as the cap allows."""
        load = self.run.load
        assert load.max_concurrency is not None
        left = math.inf if load.count is None else load.count
        end = math.inf if load.duration_s is None else self.run.start + load.duration_s
        await _until(self.run.start)

        async def user() -> None:
            nonlocal left
            while left > 0 and time.perf_counter() < end:
                left -= 1
                record = await self._send(self._call(), time.perf_counter())
                if record.outcome is Outcome.REJECTED and record.retry_after_s:
                    await _until(min(end, record.end + record.retry_after_s))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(load.max_concurrency):
                tasks.create_task(user())

    def _call(self) -> Call:
        call = next(self._plan)
        return call if self._hang_ups else replace(call, cancel_after_chunks=None, cancel_after_s=None)

    async def _in_place(self, call: Call, due: float) -> None:
        async with self._place:
            await self._send(call, due)

    async def _send(self, call: Call, due: float) -> Record:
        record = Record(call.index, call.class_name, call.request_id, due, call.slos)
        self.run.records.append(record)
        self._watcher.sent(record)
        try:
            await self._client.send(call, record)
        finally:
            self._watcher.ended(record)
        return record


async def _until(due: float) -> None:
    # A loop may wake a little early: uvloop's timers are rounded to a millisecond.
    while (wait := due - time.perf_counter()) > 0:  # noqa: ASYNC110
        await asyncio.sleep(wait)
