"""Admission by cost: what a request may take of the engine is known before it runs, and bounds what runs and waits.

A request takes rows, places for sequences in the engine's batch (one for each candidate alive at once), and tokens
(sequences times tokens, see Guide.cost). It runs at once if there are rows for it; else it waits in order of priority
and arrival, as long as all that waits is within the operator's bound of tokens; beyond that it is refused with 429 and
the time after which a retry makes sense. Wide requests (more than one row) share what narrow ones leave reserved: a
search never takes the last rows from plain chats.
"""

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from guiderail.guides.core.budget import Spend
from guiderail.guides.core.errors import DeadlinePassed
from guiderail.server.metrics import Metrics
from guiderail.server.openai_errors import ApiError
from guiderail.server.settings import OperatorLimits

LONGEST_RETRY_S = 120
SMOOTHING = 0.2  # weight of the newest request in the estimate of tokens per second


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A request as admission and the metrics know it.

    label: the guide's name, or what else the request asks for. rows, tokens: what it takes of the engine at most.
    deadline: a time.monotonic() value.
    """

    label: str
    spend: Spend
    rows: int
    tokens: int
    priority: int = 0
    deadline: float | None = None


@dataclass(order=True, slots=True)
class _Ticket:
    priority: int
    number: int
    rows: int = field(compare=False)
    tokens: int = field(compare=False)
    admitted: "asyncio.Future[None]" = field(compare=False)


class Admission:
    """Decides when requests run. Knows sequences and tokens, nothing of guides or engines."""

    def __init__(self, limits: OperatorLimits, rows: int, metrics: Metrics) -> None:
        """`rows`: what the engine decodes at once. A request that is wider runs alone among the wide ones."""
        self._limits = limits
        self._rows = rows
        self._wide_rows = max(1, rows - max(1, int(rows * limits.reserved_share)))
        self._metrics = metrics
        self._numbers = itertools.count()
        self._queues: dict[bool, list[_Ticket]] = {False: [], True: []}  # by whether wide
        self._used = {False: 0, True: 0}
        self._running_tokens = 0
        self._rate: float | None = None  # tokens per second of all that runs

    @property
    def waiting(self) -> int:
        """Requests that wait for rows."""
        return sum(not ticket.admitted.done() for queue in self._queues.values() for ticket in queue)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the requests that wait."""
        return sum(t.tokens for queue in self._queues.values() for t in queue if not t.admitted.done())

    @asynccontextmanager
    async def slot(
        self, rows: int, tokens: int, *, priority: int = 0, deadline: float | None = None
    ) -> AsyncIterator[float]:
        """Hold the request's sequences for the block; give the seconds that it waited for them.

        Raises ApiError (429) at once if too much waits already or it could not begin before its deadline (a
        time.monotonic() value), and DeadlinePassed if the deadline passes while it waits.
        """
        arrived = time.monotonic()
        ticket = _Ticket(priority, next(self._numbers), rows, tokens, asyncio.get_running_loop().create_future())
        wide = rows > 1
        if self._queues[wide] or not self._fits(ticket):
            self._check_queue(ticket, deadline)
            heapq.heappush(self._queues[wide], ticket)
            try:
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - arrived)):
                    await ticket.admitted
            except TimeoutError:
                self._forget(ticket, wide)
                raise DeadlinePassed("the deadline passed while the request waited for the engine") from None
            except BaseException:
                self._forget(ticket, wide)
                raise
        else:
            self._take(ticket)
        began = time.monotonic()
        self._metrics.queued(began - arrived)
        try:
            yield began - arrived
        finally:
            self._give_back(ticket)

    def finished(self, tokens: int, seconds: float, rows: int) -> None:
        """A request of `rows` generated so many tokens in so much time: what the engine gives is learnt from it."""
        busy = self._used[False] + self._used[True]
        if tokens and seconds > 0:
            rate = tokens / seconds * max(1.0, busy / max(1, rows))
            self._rate = rate if self._rate is None else (1 - SMOOTHING) * self._rate + SMOOTHING * rate

    def _fits(self, ticket: _Ticket) -> bool:
        narrow, wide = self._used[False], self._used[True]
        if ticket.rows > 1:
            return not wide or wide + ticket.rows <= min(self._wide_rows, self._rows - narrow)
        # What the wide ones have beyond their share waits inside the engine, behind narrow rows.
        return narrow + ticket.rows + min(wide, self._wide_rows) <= self._rows

    def _take(self, ticket: _Ticket) -> None:
        self._used[ticket.rows > 1] += ticket.rows
        self._running_tokens += ticket.tokens

    def _give_back(self, ticket: _Ticket) -> None:
        self._used[ticket.rows > 1] -= ticket.rows
        self._running_tokens -= ticket.tokens
        self._admit()

    def _admit(self) -> None:
        for queue in self._queues.values():
            while queue and (queue[0].admitted.done() or self._fits(queue[0])):
                ticket = heapq.heappop(queue)
                if not ticket.admitted.done():
                    self._take(ticket)
                    ticket.admitted.set_result(None)

    def _forget(self, ticket: _Ticket, wide: bool) -> None:
        if ticket.admitted.done() and not ticket.admitted.cancelled():  # it got its rows just as it gave up
            self._give_back(ticket)
            return
        ticket.admitted.cancel()
        self._queues[wide] = [each for each in self._queues[wide] if each is not ticket]
        heapq.heapify(self._queues[wide])
        self._admit()

    def _check_queue(self, ticket: _Ticket, deadline: float | None) -> None:
        waiting = self.waiting_tokens
        wait = self._seconds(waiting + self._running_tokens / 2)
        if self.waiting >= self._limits.max_queue or waiting + ticket.tokens > self._limits.max_queue_tokens:
            raise self._overloaded(
                f"too much is waiting already ({self.waiting} requests of {waiting} tokens; this one may take "
                f"{ticket.tokens})",
                wait,
            )
        if deadline is not None and wait is not None and time.monotonic() + wait > deadline:
            raise self._overloaded(f"it would wait about {wait:.0f} s, beyond its deadline", wait)

    def _seconds(self, tokens: float) -> float | None:
        return None if self._rate is None else tokens / self._rate

    def _overloaded(self, why: str, wait: float | None) -> ApiError:
        after = 1 if wait is None else min(LONGEST_RETRY_S, max(1, math.ceil(wait)))
        return ApiError(
            429, f"the server is overloaded: {why}; try again in about {after} s", type="rate_limit_error",
            code="overloaded", retry_after_s=after,
        )  # fmt: skip
