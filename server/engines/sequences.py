"""Sequences of one generation: each is started and streamed on its own, and their deltas are merged.

They are given up together: an engine looks through all that waits in it for each call that aborts, so that thousands of
calls would keep it from everything else.

Knows neither the engine behind a sequence nor prompts and sampling parameters.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from guiderail.guides.core.errors import EngineUnavailable
from guiderail.guides.core.types import Delta


class EngineSequence(Protocol):
    """One sequence that an engine is to continue."""

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """Start it and yield what it gains. The last delta has a finish reason, "abort" if it was aborted."""
        ...

    def give_up(self) -> Sequence[str]:
        """Let it end, whether it has started or not; return the ids by which the engine knows its work."""
        ...


Free = Callable[[Sequence[str]], Awaitable[None]]  # frees an engine's work by ids, unless it is gone, in one call


async def nothing_to_free(ids: Sequence[str]) -> None:
    """Free the work of sequences that end by themselves when they are given up."""


def new_request_id() -> str:
    """Return an id that no other request has."""
    return uuid.uuid4().hex


class EngineRollouts:
    """guiderail.guides.Rollouts over the sequences of an engine, in the order of their deltas' numbers."""

    def __init__(
        self, sequences: Sequence[EngineSequence], deadline: float | None, free: Free = nothing_to_free
    ) -> None:
        """deadline: a time.monotonic() value at which sequences that still run are dropped."""
        self._sequences = sequences
        self._deadline = deadline
        self._free = free
        self._reasons: dict[int, str] = {}
        self._running = set(range(len(sequences)))
        self._queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._dropped: list[int] = []
        self._freeing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._deadline is not None:
            left = max(0.0, self._deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(left, self._drop_all, "deadline")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.shield(self._end())

    async def _end(self) -> None:
        if self._freeing is not None:
            await asyncio.gather(self._freeing, return_exceptions=True)
        await _end([self._sequences[row] for row in sorted(self._running)], self._tasks, self._free)

    def _drop_all(self, reason: str) -> None:
        for row in sorted(self._running):
            self._drop(row, reason)

    async def drop(self, row: int, reason: str = "dropped") -> None:
        self._drop(row, reason)

    def _drop(self, row: int, reason: str) -> None:
        """Note a row to be dropped; all that are noted in one turn of the event loop are given up together."""
        if row not in self._running or row in self._reasons:
            return
        self._reasons[row] = reason
        self._dropped.append(row)
        if self._freeing is None or self._freeing.done():
            self._freeing = asyncio.create_task(self._free_dropped())

    async def _free_dropped(self) -> None:
        while self._dropped:
            rows, self._dropped = self._dropped, []
            await _give_up([self._sequences[row] for row in rows], self._free)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        if len(self._sequences) == 1:  # no task and queue between the engine and a plain stream
            async with aclosing(self._start(0)) as deltas:
                async for delta in deltas:
                    yield self._checked(0, delta)
            self._check_end(0)
            return
        self._tasks = [asyncio.create_task(self._pump(index)) for index in range(len(self._sequences))]
        for _ in self._tasks:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item

    async def _pump(self, index: int) -> None:
        """Put the deltas of one sequence into the queue, then None, or the error that ended it."""
        try:
            async with aclosing(self._start(index)) as deltas:
                async for delta in deltas:
                    self._queue.put_nowait(self._checked(index, delta))
            self._check_end(index)
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)

    def _start(self, index: int) -> AsyncGenerator[Delta, None]:
        return _never_started(index) if index in self._reasons else self._sequences[index].deltas()

    def _checked(self, index: int, delta: Delta) -> Delta:
        """Return the delta with the reason for which we dropped its sequence, where that ended it."""
        if delta.finish_reason is None:
            return delta
        self._running.discard(index)
        if delta.finish_reason == "abort":
            return replace(delta, finish_reason=self._reasons.get(index, "dropped"))
        if delta.finish_reason not in ("stop", "length"):
            raise EngineUnavailable(f"the engine ended a sequence with '{delta.finish_reason}'")
        return delta

    def _check_end(self, index: int) -> None:
        if index in self._running:
            raise EngineUnavailable("the engine ended a sequence without a finish reason")


async def run_to_end(sequences: Iterable[EngineSequence], at_once: int, free: Free) -> list[Delta]:
    """Return the last delta of each sequence, in their order. So many run at once; later ones are made when they start.

    Raises what a sequence raises, and EngineUnavailable for one that says nothing. All that run end with the call.
    """
    last: dict[int, Delta] = {}
    running: set[EngineSequence] = set()
    numbered = enumerate(sequences)

    async def work() -> None:
        for number, sequence in numbered:
            running.add(sequence)
            async with aclosing(sequence.deltas()) as deltas:
                async for delta in deltas:
                    last[number] = delta
            running.remove(sequence)
            if number not in last:
                raise EngineUnavailable("the engine returned nothing")

    tasks = [asyncio.create_task(work()) for _ in range(at_once)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)  # gather would cancel each by itself
        for task in tasks:
            if task.done():
                task.result()
    finally:
        await asyncio.shield(_end(running, tasks, free))
    return [last[number] for number in range(len(last))]


async def _give_up(sequences: Iterable[EngineSequence], free: Free) -> None:
    """Free the work of all sequences in one call."""
    if ids := [each for sequence in sequences for each in sequence.give_up()]:
        await free(ids)


async def _end(running: Iterable[EngineSequence], tasks: Sequence[asyncio.Task[None]], free: Free) -> None:
    """Free the work of all sequences in one call, and only then end the tasks, each of which would free its own."""
    try:
        await _give_up(running, free)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _never_started(index: int) -> AsyncGenerator[Delta, None]:
    yield Delta(index, "", (), "abort")
