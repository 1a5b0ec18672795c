"""The end of the process: what signals do, child processes, and threads that would keep it."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Collection
from contextlib import suppress
from types import FrameType
from typing import Self

import psutil

STOPPED = 130  # the exit status after a signal that nothing was finished for
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Ending:
    """For the time of its block SIGTERM and Ctrl-C end the process: once `orderly` by setting `stop`, else at once.

    A second signal ends it at once, too, and so does the time if `stop` has not ended it within `within_s` seconds.
    Child processes that were there before the block are left alone. To be used on the main thread of a running loop.
    """

    def __init__(self, stop: asyncio.Event, within_s: float | None = None) -> None:
        self.stop = stop
        self.orderly = False
        self._within_s = within_s
        self._signalled = False

    def __enter__(self) -> Self:
        self._before = _children()
        self._loop = asyncio.get_running_loop()
        # Not the loop's own handlers, which wait for a loop that something blocks.
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def children(self) -> set[psutil.Process]:
        """Return the processes that descend from this one since the block began."""
        return _children() - self._before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.orderly or self._signalled:
            self._at_once("stopped at once" if self._signalled else "stopped while starting", STOPPED)
        self._signalled = True
        self._loop.call_soon_threadsafe(self.stop.set)
        if self._within_s is not None:  # by the clock's signal: no lock is taken here that this may have interrupted
            signal.signal(signal.SIGALRM, self._give_up)
            signal.setitimer(signal.ITIMER_REAL, self._within_s)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        """End what keeps the process: an executor's thread that computes for ever, an engine that does not end."""
        kept = [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
        self._at_once(f"stopped, though something still ran (threads: {', '.join(kept) or 'none'})", 0)

    def _at_once(self, words: str, status: int) -> None:
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f"guiderail: {words}\n".encode())  # `print` may be what was interrupted
        end_processes(self.children(), within_s=1)
        os._exit(status)


def end_processes(processes: Collection[psutil.Process], within_s: float = 5) -> None:
    """End processes, politely for so many seconds."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))
