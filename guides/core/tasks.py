"""Small helpers for concurrent work: the first error cancels the rest and is raised as itself."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """asyncio.TaskGroup, but raising its first error bare instead of in an ExceptionGroup."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def together(work: Iterable[Coroutine[None, None, T]]) -> list[T]:
    """Results of all coroutines, run concurrently, in their order."""
    coroutines = list(work)
    if len(coroutines) == 1:  # as of one reward: no task to start
        return [await coroutines[0]]
    async with task_group() as group:
        tasks = [group.create_task(each) for each in coroutines]
    return [task.result() for task in tasks]


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
