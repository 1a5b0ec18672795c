"""Work on large bodies off the event loop: parsing, checking, tokenising and writing them, in few threads.

Clients take turns (requests/turns.py), so that one with many large bodies does not keep the others waiting. What is
small is done at once, where it is asked for.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from guiderail.server.requests.clients import Client
from guiderail.server.requests.turns import Turns

T = TypeVar("T")
THREADS = 2
SMALL = 2**15  # bytes that are dealt with in a millisecond or so


class Workers:
    """Threads for what would keep everybody else from the event loop."""

    def __init__(self, threads: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, "guiderail-worker")
        self._free = threads
        self._turns = Turns()
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []

    async def run(self, client: Client, size: int, work: Callable[[], T]) -> T:
        """Return the result of work on so many bytes for a client. Cancelled work that has begun goes on to its end."""
        if size < SMALL:
            return work()
        place = self._turns.place(client, size)
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (place, next(self._numbers), turn))
        self._start()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._turns.give_up(client, size)
            else:
                self._end()
            raise
        running = asyncio.get_running_loop().run_in_executor(self._pool, work)
        running.add_done_callback(self._ended)
        return await asyncio.shield(running)  # else its thread would count as free while it still works

    def _start(self) -> None:
        while self._free and self._waiting:
            place, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self._free -= 1
                self._turns.begin(place)
                turn.set_result(None)

    def _ended(self, work: asyncio.Future[T]) -> None:
        work.exception()  # which the caller may not be there to take
        self._end()

    def _end(self) -> None:
        self._free += 1
        self._start()
