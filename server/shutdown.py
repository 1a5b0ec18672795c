"""The end of a server's work: none is begun any more, what runs gets its time, and what is left is ended."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

LAST_WORDS_S = 2.0  # for the last event of what is ended, to a client that may not be reading


class Shutdown:
    """Whether the server takes work, and the tasks that do it."""

    def __init__(self) -> None:
        self.begun = False
        self.over = False
        self._tasks: set[asyncio.Task[object]] = set()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the present task as work for the block. Once `over` it is cancelled."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def drain(self, seconds: float) -> None:
        """Begin the shutdown. Return when all work has ended, of itself within these seconds or by being cancelled."""
        self.begun = True
        late = await _wait(self._tasks, seconds)
        self.over = True
        for task in late:
            task.cancel()
        await _wait(late, LAST_WORDS_S)


async def _wait(tasks: set[asyncio.Task[object]], seconds: float) -> set[asyncio.Task[object]]:
    """Wait for tasks; return those that have not ended in time."""
    return (await asyncio.wait(tasks, timeout=seconds))[1] if tasks else set()
