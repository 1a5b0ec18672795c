"""Small helpers for concurrent work: the first error cancels the rest and is raised as itself."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
MOST_THREADS = 8  # of one `Threads`; calls beyond wait for one that is free


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """asyncio.TaskGroup, but raising its first error bare, with its own cause, instead of in an ExceptionGroup."""
    first: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
    if first is not None:
        raise first


async def together(work: Iterable[Coroutine[None, None, T]], at_once: int | None = None) -> list[T]:
    """Results of all coroutines, run concurrently, in their order; at most so many at once, None being all."""
    if at_once is None:
        coroutines = list(work)
        if len(coroutines) == 1:  # as of one reward: no task to start
            return [await coroutines[0]]
        async with task_group() as group:
            tasks = [group.create_task(each) for each in coroutines]
        return [task.result() for task in tasks]
    numbered, found = enumerate(work), dict[int, T]()

    async def some() -> None:
        for number, each in numbered:
            found[number] = await each

    async with task_group() as group:
        for _ in range(at_once):
            group.create_task(some())
    return [found[number] for number in range(len(found))]


class Background:
    """Work that goes on beside its owner's, and ends with it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def start(self, work: Coroutine[None, None, T]) -> "asyncio.Task[T]":
        """Begin the work."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        return task

    async def close(self) -> None:
        """Cancel what is not done yet, and wait until it is over."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Threads:
    """Threads of one owner for calls that compute, kept for the next ones.

    Unlike those of the event loop's executor nobody else waits for them, and a call that never returns keeps neither
    others' calls nor the process from their end.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._count = self._pending = 0

    async def run(self, function: Callable[[], T]) -> T:
        """Return what a function returns, or raise what it raises: as a RuntimeError what no task can raise."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(give: Callable[[], object]) -> None:
            self._pending -= 1
            if not future.done():
                give()

        def call() -> None:
            give: Callable[[], object] = future.cancel
            if not future.done():  # else it was given up while it waited
                try:
                    give = partial(future.set_result, function())
                except BaseException as error:
                    raised = isinstance(error, Exception) and not isinstance(error, StopIteration)
                    failure = error if raised else RuntimeError(f"{type(error).__name__}: {error}")
                    give = partial(future.set_exception, failure)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, give)

        self._pending += 1
        if self._count < min(self._pending, MOST_THREADS):
            self._count += 1
            threading.Thread(target=self._work, name="guiderail-call", daemon=True).start()
        self._calls.put(call)
        return await future

    def _work(self) -> None:
        while True:
            self._calls.get()()
