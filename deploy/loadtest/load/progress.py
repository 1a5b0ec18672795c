"""The live display of a run: one line on a terminal, nothing elsewhere."""

import sys
import time
from collections import Counter, deque
from statistics import median

from tqdm import tqdm

from guiderail.loadtest.load.runner import Load, Unwatched, Watcher
from guiderail.loadtest.report.records import Outcome, Record

EVERY_S = 0.25  # between redraws; drawing takes time that the schedule needs


class Line:
    """Line with requests ended, outcomes so far, requests in flight, and the median TTFT of the last 100 answers."""

    def __init__(self, title: str, load: Load) -> None:
        expected = load.count
        if expected is None and load.offered_rps is not None and load.duration_s is not None:
            expected = round(load.offered_rps * load.duration_s)
        self._bar = tqdm(total=expected, desc=title, unit="req", mininterval=EVERY_S, dynamic_ncols=True)
        self._outcomes: Counter[Outcome | None] = Counter()
        self._ttfts: deque[float] = deque(maxlen=100)
        self._in_flight = 0
        self._drawn = 0.0

    def sent(self, record: Record) -> None:
        """Count one more request in flight."""
        self._in_flight += 1

    def ended(self, record: Record) -> None:
        """Count one request as ended."""
        self._in_flight -= 1
        self._outcomes[record.outcome] += 1
        if record.ttft is not None:
            self._ttfts.append(record.ttft)
        now = time.perf_counter()
        if now - self._drawn >= EVERY_S:
            self._drawn = now
            others = (f"{name} {n}" for name, n in self._outcomes.items() if name is not Outcome.COMPLETED)
            ttft = f"ttft {median(self._ttfts) * 1000:.0f} ms" if self._ttfts else ""
            parts = [f"{self._in_flight} in flight", ttft, *others]
            self._bar.set_postfix_str(", ".join(part for part in parts if part), refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._bar.close()


def watcher(title: str, load: Load, enabled: bool) -> Watcher:
    """The display of a load; silent if disabled or if standard error is not a terminal."""
    return Line(title, load) if enabled and sys.stderr is not None and sys.stderr.isatty() else Unwatched()
