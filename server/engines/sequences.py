"""Rows of a generation: one engine request each, their deltas merged as they come.

Knows of its engine only that it streams deltas of a request and aborts requests by id.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

from guiderail.guides.core.errors import EngineUnavailable
from guiderail.guides.core.types import Delta, TokenPrompt


class RowEngine(Protocol):
    """What the rows need of an engine. `params` is whatever the engine samples with."""

    def deltas(self, row: int, prompt: TokenPrompt, params: Any, request_id: str) -> AsyncGenerator[Delta, None]: ...

    async def abort(self, request_ids: Sequence[str]) -> None: ...


def new_request_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex


class EngineRollouts:
    """guiderail.guides.Rollouts over a RowEngine."""

    def __init__(
        self, engine: RowEngine, prompts: Sequence[TokenPrompt], params: Sequence[Any], deadline: float | None
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._params = params
        self._deadline = deadline
        self._ids = [new_request_id() for _ in prompts]
        self._reasons: dict[int, str] = {}
        self._running = set(range(len(prompts)))
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
            await asyncio.shield(self._engine.abort([self._ids[row] for row in sorted(self._running)]))

    def _expire(self) -> None:
        self._expiry = asyncio.get_running_loop().create_task(self._expire_rows())

    async def _expire_rows(self) -> None:
        for row in sorted(self._running):
            await self.drop(row, "deadline")

    async def drop(self, row: int, reason: str = "dropped") -> None:
        if row in self._running and row not in self._reasons:
            self._reasons[row] = reason
            await self._engine.abort([self._ids[row]])

    async def __aiter__(self) -> AsyncIterator[Delta]:
        if len(self._prompts) == 1:  # no task and queue between the engine and a plain stream
            async with aclosing(self._row(0)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        self._tasks = [asyncio.create_task(self._pump(row)) for row in range(len(self._prompts))]
        for _ in range(len(self._prompts)):
            while (item := await self._queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item

    async def _pump(self, row: int) -> None:
        try:
            async with aclosing(self._row(row)) as deltas:
                async for delta in deltas:
                    self._queue.put_nowait(delta)
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)

    async def _row(self, row: int) -> AsyncGenerator[Delta, None]:
        """Deltas of one row, the last with a finish reason."""
        if row in self._reasons:  # dropped before it was submitted
            self._running.discard(row)
            yield Delta(row, "", (), self._reasons[row])
            return
        finished = False
        source = self._engine.deltas(row, self._prompts[row], self._params[row], self._ids[row])
        async with aclosing(source) as deltas:
            async for delta in deltas:
                if delta.finish_reason is not None:
                    finished = True
                    self._running.discard(row)
                    if delta.finish_reason == "abort":
                        delta = replace(delta, finish_reason=self._reasons.get(row, "dropped"))
                    elif delta.finish_reason not in ("stop", "length"):
                        raise EngineUnavailable(f"the engine ended a row with '{delta.finish_reason}'")
                yield delta
        if not finished:
            raise EngineUnavailable("the engine ended a row without a finish reason")
