"""Whose turn it is: start-time fair queueing (Goyal, Vin and Cheng 1996) over clients, by what they ask for.

Each piece of work has a place on a virtual clock: where its client's last one ends, and never before the clock's
present. The smallest place goes first. So one client's pieces keep their order, and clients that ask at the same time
are served in equal shares, however many pieces each of them has.
"""

from guiderail.server.requests.clients import Client

REMEMBERED = 1024  # clients, beyond which those that owe nothing are forgotten


class Turns:
    """The virtual clock, and where each client's work ends on it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[Client, float] = {}

    def place(self, client: Client, cost: float) -> float:
        """Give the client's next piece of work, of this cost (at least 1 is taken), its place."""
        if len(self._ends) >= REMEMBERED:
            self._ends = {each: end for each, end in self._ends.items() if end > self._now}
        start = max(self._now, self._ends.get(client, 0.0))
        self._ends[client] = start + max(1.0, cost)
        return start

    def begin(self, place: float) -> None:
        """Note that the work of this place begins: the clock shows it from now on."""
        self._now = max(self._now, place)

    def give_up(self, client: Client, cost: float) -> None:
        """Note that a piece of work that has not begun will not: its client's next ones do not wait for it."""
        if client in self._ends:
            self._ends[client] -= max(1.0, cost)
