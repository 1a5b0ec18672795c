"""An event loop whose clock stands still while anything is computed and jumps to the next timer when nothing is.

A client and a server that share it are timed exactly, however busy the machine is and however little of it they get.
"""

import asyncio
import functools
import selectors
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from unittest.mock import patch

GRACE_S = 0.002  # real time in which what was written to a socket may arrive at its other end, before the clock jumps
TICK_S = 1e-9  # a jump goes this far past its timer, which rounding could else leave a little ahead for ever


class _Selector(selectors.DefaultSelector):
    now = 1000.0

    def select(self, timeout: float | None = None) -> Sequence[Any]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        ready = super().select(None if timeout is None else GRACE_S)
        if not ready and timeout is not None:
            self.now += max(0.0, timeout) + TICK_S
        return ready


class VirtualTime(asyncio.SelectorEventLoop):
    """The loop. Its `time` is seconds from an arbitrary moment, as `time.perf_counter`'s."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs a test on such a loop, with `time.perf_counter` and `time.monotonic` set to its clock.

    It takes no asynchronous fixtures.
    """

    @functools.wraps(test)
    def timed(*self: Any, **fixtures: Any) -> None:
        loop = VirtualTime()
        try:
            with patch("time.perf_counter", loop.time), patch("time.monotonic", loop.time):
                loop.run_until_complete(test(*self, **fixtures))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    return timed
