"""Admission by cost: what a request may take of the engine is known before it runs, and bounds what runs and waits.

A request takes rows, places for sequences in the engine's batch (one for each candidate alive at once), and tokens
(sequences times tokens, see Guide.cost). It runs at once if there are rows for it; else it waits, in order of priority
and of its client's turn (turns.py), as long as all that waits is within the operator's bounds; beyond them it is
refused with 429 and the time after which a retry makes sense. Wide requests (more than one row) share what narrow ones
leave reserved: a search never takes the last rows from plain chats. Nor does one client take the last rows from others:
some are kept for clients of which nothing runs. A full queue has room for a client that waits with little: the last
requests of one that waits with more are refused in its stead.
"""

import asyncio
import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from guiderail.guides.core.errors import DeadlinePassed
from guiderail.guides.core.metering import Spend
from guiderail.server.metrics import Metrics
from guiderail.server.openai_errors import ApiError
from guiderail.server.requests.clients import NOBODY, Client
from guiderail.server.requests.turns import Turns
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
    client: Client = NOBODY
    priority: int = 0
    deadline: float | None = None


@dataclass(eq=False, slots=True)
class _Ticket:
    client: Client
    rows: int
    tokens: int
    order: tuple[int, float, int]  # priority, its client's turn, number
    admitted: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def wide(self) -> bool:
        return self.rows > 1


class Admission:
    """Decides when requests run. Knows clients, sequences and tokens, nothing of guides or engines."""

    def __init__(self, limits: OperatorLimits, rows: int, metrics: Metrics) -> None:
        """`rows`: what the engine decodes at once. A request that is wider runs alone among the wide ones."""
        self._limits = limits
        self._rows = rows
        self._wide_rows = max(1, rows - max(1, int(rows * limits.reserved_share)))
        self._newcomer_rows = int(rows * limits.newcomer_share)
        self._metrics = metrics
        self._numbers = itertools.count()
        self._turns = Turns()
        self._waiting: list[_Ticket] = []  # in order
        self._used = {False: 0, True: 0}  # rows, by whether wide
        self._narrow_rows: Counter[Client] = Counter()
        self._requests: Counter[Client] = Counter()  # running and waiting
        self._tokens: Counter[Client] = Counter()
        self._running_tokens = 0
        self._rate: float | None = None  # tokens per second of all that runs

    @property
    def waiting(self) -> int:
        """Requests that wait for rows."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the requests that wait."""
        return sum(ticket.tokens for ticket in self._waiting)

    @asynccontextmanager
    async def slot(
        self, rows: int, tokens: int, *, client: Client = NOBODY, priority: int = 0, deadline: float | None = None
    ) -> AsyncIterator[float]:
        """Hold the request's sequences for the block; give the seconds that it waited for them.

        Raises ApiError (429) at once if too much waits already, its client has too much in flight or it could not begin
        before its deadline (a time.monotonic() value), later if it has to make room, and DeadlinePassed if the deadline
        passes while it waits.
        """
        arrived = time.monotonic()
        self._check_client(client, tokens)
        ticket = _Ticket(client, rows, tokens, (priority, self._turns.place(client, tokens), next(self._numbers)))
        self._requests[client] += 1
        self._tokens[client] += tokens
        self._waiting.append(ticket)
        try:
            self._admit()
            if not ticket.admitted.done():
                await self._wait(ticket, deadline)
            began = time.monotonic()
            self._metrics.queued(began - arrived)
            try:
                yield began - arrived
            finally:
                self._give_back(ticket)
        finally:
            self._requests -= Counter({client: 1})  # which drops what comes to 0
            self._tokens -= Counter({client: tokens})

    def finished(self, tokens: int, seconds: float, rows: int) -> None:
        """A request of `rows` generated so many tokens in so much time: what the engine gives is learnt from it."""
        busy = self._used[False] + self._used[True]
        if tokens and seconds > 0:
            rate = tokens / seconds * max(1.0, busy / max(1, rows))
            self._rate = rate if self._rate is None else (1 - SMOOTHING) * self._rate + SMOOTHING * rate

    async def _wait(self, ticket: _Ticket, deadline: float | None) -> None:
        """Wait until the ticket is admitted. Raises ApiError (429) and DeadlinePassed."""
        try:
            self._make_room(ticket, deadline)
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                await ticket.admitted
        except BaseException as error:
            self._forget(ticket)
            if isinstance(error, TimeoutError):
                raise DeadlinePassed("the deadline passed while the request waited for the engine") from None
            raise

    def _free(self, ticket: _Ticket) -> int:
        """Rows that are free for requests of this width."""
        narrow, wide = self._used[False], self._used[True]
        if ticket.wide:
            return min(self._wide_rows, self._rows - narrow - self._newcomer_rows) - wide if wide else ticket.rows
        # What the wide ones have beyond their share waits inside the engine, behind narrow rows.
        return self._rows - narrow - min(wide, self._wide_rows)

    def _kept(self, ticket: _Ticket) -> int:
        """Of the free rows, those kept for others than the ticket's client."""
        return self._newcomer_rows if not ticket.wide and self._narrow_rows[ticket.client] else 0

    def _admit(self) -> None:
        """Admit all that has its turn and its rows."""
        self._waiting.sort(key=lambda each: each.order)
        full: set[bool] = set()
        for ticket in self._waiting[:]:
            if ticket.wide in full or ticket.admitted.done():  # done: it gives up, and is about to leave the queue
                continue
            free = self._free(ticket)
            if ticket.rows > free:  # whoever comes after it waits too, or it would never get its rows
                full.add(ticket.wide)
            elif ticket.rows <= free - self._kept(ticket):
                self._waiting.remove(ticket)
                self._take(ticket)
                ticket.admitted.set_result(None)

    def _take(self, ticket: _Ticket) -> None:
        self._turns.begin(ticket.order[1])
        self._used[ticket.wide] += ticket.rows
        self._running_tokens += ticket.tokens
        if not ticket.wide:
            self._narrow_rows[ticket.client] += ticket.rows

    def _give_back(self, ticket: _Ticket) -> None:
        self._used[ticket.wide] -= ticket.rows
        self._running_tokens -= ticket.tokens
        if not ticket.wide:
            self._narrow_rows -= Counter({ticket.client: ticket.rows})  # which drops what comes to 0
        self._admit()

    def _forget(self, ticket: _Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._turns.give_up(ticket.client, ticket.tokens)
            self._admit()
        elif ticket.admitted.done() and not ticket.admitted.cancelled() and ticket.admitted.exception() is None:
            self._give_back(ticket)  # it got its rows just as it gave up

    def _check_client(self, client: Client, tokens: int) -> None:
        """Raise ApiError (429) if the client has more in flight than one may have."""
        limits, requests, held = self._limits, self._requests[client], self._tokens[client]
        most, most_tokens = limits.max_client_requests, limits.max_client_tokens
        if most is not None and requests >= most:
            why = f"{client} has {requests} requests in flight; one client may have {most}"
        elif most_tokens is not None and requests and held + tokens > most_tokens:
            why = (
                f"{client} has requests of {held} tokens in flight, and this one may take {tokens}; "
                f"one client may have {most_tokens}"
            )
        else:
            return
        raise _refusal(why, self._seconds(held / max(1, requests)), "client_limit")

    def _make_room(self, ticket: _Ticket, deadline: float | None) -> None:
        """Raise ApiError (429) if the ticket cannot wait; refuse others if it may wait in their stead."""
        ahead = sum(each.tokens for each in self._waiting if each.order < ticket.order)
        wait = self._seconds(ahead + self._running_tokens / 2)
        if deadline is not None and wait is not None and time.monotonic() + wait > deadline:
            raise _refusal(f"it would wait about {wait:.0f} s, beyond its deadline", wait)
        others = len(self._waiting) - 1
        tokens = self.waiting_tokens
        victims = self._victims(ticket)
        if victims is None:
            raise _refusal(
                f"too much is waiting already ({others} requests of {tokens - ticket.tokens} tokens; this one may take "
                f"{ticket.tokens})",
                self._seconds(tokens - ticket.tokens + self._running_tokens / 2),
            )
        for victim in victims:
            self._waiting.remove(victim)
            self._turns.give_up(victim.client, victim.tokens)
            why = f"{victim.client} waits with more than others, for whom there must be room"
            victim.admitted.set_exception(_refusal(why, wait))

    def _victims(self, ticket: _Ticket) -> list[_Ticket] | None:
        """The waiting requests, each client's last ones first, that make room for this one; None if they cannot.

        Nobody makes room for a client that waits with as much as itself.
        """
        most, most_tokens = self._limits.max_queue, self._limits.max_queue_tokens
        count, tokens = len(self._waiting), self.waiting_tokens
        share: defaultdict[Client, float] = defaultdict(float)  # of the queue, to compare requests and tokens
        for each in self._waiting:
            share[each.client] += 1 / max(1, most) + each.tokens / max(1, most_tokens)
        victims: list[_Ticket] = []
        for each in reversed(self._waiting):
            if count <= most and tokens <= most_tokens:
                break
            if share[each.client] > share[ticket.client]:
                victims.append(each)
                count, tokens = count - 1, tokens - each.tokens
                share[each.client] -= 1 / max(1, most) + each.tokens / max(1, most_tokens)
        return victims if count <= most and tokens <= most_tokens else None

    def _seconds(self, tokens: float) -> float | None:
        return None if self._rate is None else tokens / self._rate


def _refusal(why: str, wait: float | None, code: str = "overloaded") -> ApiError:
    after = 1 if wait is None else min(LONGEST_RETRY_S, max(1, math.ceil(wait)))
    what = "too much at once" if code == "client_limit" else "the server is overloaded"
    return ApiError(
        429, f"{what}: {why}; try again in about {after} s", type="rate_limit_error", code=code, retry_after_s=after
    )
