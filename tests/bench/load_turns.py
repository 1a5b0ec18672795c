"""Two servers compared by turns under load: ratios over all their requests, and how sure those are.

A p99 of one turn is its slowest request or two, and these machines' speed drifts by half within minutes: so turns are
taken alternately, and the requests of all of them make one distribution for each server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from figures import interval


@dataclass(frozen=True)
class Turn:
    """One server's turn: times to first token in ms from the scheduled send, answered tokens, seconds, failures."""

    ttfts: list[float]
    tokens: int
    seconds: float
    failed: int

    @classmethod
    def of(cls, result: dict[str, Any]) -> Turn:
        """From the JSON of `guiderail loadtest --save-detailed`."""
        ttfts = [round(1000 * ttft, 1) for ttft in result["ttfts"] if ttft]  # 0: no text came
        return cls(ttfts, result["total_output_tokens"], round(result["duration"], 3), result["failed"])

    def summary(self) -> dict[str, float]:
        """What is written down of it."""
        median, p99 = (round(ttft_at(percentile)([self]), 1) for percentile in (50, 99))
        counts = {"requests": len(self.ttfts), "failed": self.failed, "tokens": self.tokens, "seconds": self.seconds}
        return {"ttft_median_ms": median, "ttft_p99_ms": p99} | counts


Figure = Callable[[Sequence[Turn]], float]


def throughput(turns: Sequence[Turn]) -> float:
    """Tokens per second."""
    return sum(turn.tokens for turn in turns) / sum(turn.seconds for turn in turns)


def ttft_at(percentile: float) -> Figure:
    """A percentile of the times to first token, ms."""
    return lambda turns: float(np.percentile([ttft for turn in turns for ttft in turn.ttfts], percentile))


def compared(pairs: Sequence[tuple[Turn, Turn]], of: Figure) -> tuple[float, float, float]:
    """Ratio of a figure over pairs of turns, first server to second: (value, 2.5%, 97.5%) by a bootstrap of pairs."""

    def ratio(drawn: np.ndarray) -> float:
        first, second = zip(*(pairs[int(index)] for index in drawn), strict=True)
        return of(first) / of(second)

    return interval(range(len(pairs)), lambda rows: np.apply_along_axis(ratio, -1, rows))


def shown(figure: tuple[float, float, float], digits: int) -> str:
    """`value (low-high)`."""
    value, low, high = (f"{each:.{digits}f}" for each in figure)
    return f"{value} ({low}-{high})"
