"""Sequences of one generation: each is started, streamed and aborted on its own, and their deltas are merged.

Knows neither the engine behind a sequence nor prompts and sampling parameters.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
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

    async def abort(self) -> None:
        """Free its work in the engine, whether it has started or not."""
        ...


def new_request_id() -> str:
    """Return an id that no other request has."""
    return uuid.uuid4().hex


class EngineRollouts:
    """guiderail.guides.Rollouts over the sequences of an engine, in the order of their deltas' numbers."""

    def __init__(self, sequences: Sequence[EngineSequence], deadline: float | None) -> None:
        """deadline: a time.monotonic() value at which sequences that still run are dropped."""
        self._sequences = sequences
        self._deadline = deadline
        self._reasons: dict[int, str] = {}
        self._running = set(range(len(sequences)))
        self._queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._expiry: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._deadline is not None:
            left = max(0.0, self._deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(left, self._expire)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        pending = [task for task in (*self._tasks, self._expiry) if task is not None and not task.done()]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if self._running:
            aborts = [self._sequences[index].abort() for index in sorted(self._running)]
            await asyncio.shield(asyncio.gather(*aborts))

    def _expire(self) -> None:
        self._expiry = asyncio.get_running_loop().create_task(self._drop_all("deadline"))

    async def _drop_all(self, reason: str) -> None:
        for index in sorted(self._running):
            await self.drop(index, reason)

    async def drop(self, row: int, reason: str = "dropped") -> None:
        if row in self._running and row not in self._reasons:
            self._reasons[row] = reason
            await self._sequences[row].abort()

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


async def _never_started(index: int) -> AsyncGenerator[Delta, None]:
    yield Delta(index, "", (), "abort")
