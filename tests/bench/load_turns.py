"""Two servers compared in turns under load: ratios over all their requests, with intervals.

The p99 of one turn is its slowest request or two, and the speed of these machines drifts by half within minutes. So the
servers take turns, and the requests of all turns form one distribution for each server.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from measured import interval, verdict
from report import Target

WATCH_S = 0.02  # seconds between two samples of a thread that watches for pauses of the machine


@dataclass(frozen=True)
class Turn:
    """One server's turn: times to first token in ms from the scheduled send, mean time per output token in ms, answered
    tokens, seconds, failures, and the longest delay of a waking thread by the machine, ms."""

    ttfts: list[float]
    tpot: float
    tokens: int
    seconds: float
    failed: int
    stall: float

    @classmethod
    def of(cls, result: dict[str, Any], stall: float) -> Turn:
        """From the JSON of `guiderail loadtest --save-detailed`."""
        ttfts = [round(1000 * ttft, 1) for ttft in result["ttfts"] if ttft]  # 0: no text came
        return cls(
            ttfts,
            result["mean_tpot_ms"],
            result["total_output_tokens"],
            round(result["duration"], 3),
            result["failed"],
            stall,
        )

    def summary(self) -> dict[str, float]:
        """The values kept in the JSON file."""
        median, p99 = (round(ttft_at(percentile)([self]), 1) for percentile in (50, 99))
        counts = {"requests": len(self.ttfts), "failed": self.failed, "tokens": self.tokens, "seconds": self.seconds}
        return {
            "ttft_median_ms": median,
            "ttft_p99_ms": p99,
            "tpot_mean_ms": round(self.tpot, 1),
            "longest_stall_ms": round(self.stall, 1),
        } | counts


class Stalls:
    """Delays with which a sleeping thread of each CPU wakes, while entered: pauses of the machine, not of a server."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(cpu,)) for cpu in os.sched_getaffinity(0)]

    def __enter__(self) -> Stalls:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _watch(self, cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread alone
        before = time.monotonic()
        while not self._over.wait(WATCH_S):
            now = time.monotonic()
            self.longest_ms = max(self.longest_ms, 1000 * (now - before - WATCH_S))
            before = now


Metric = Callable[[Sequence[Turn]], float]


def throughput(turns: Sequence[Turn]) -> float:
    """Tokens per second."""
    return sum(turn.tokens for turn in turns) / sum(turn.seconds for turn in turns)


def time_per_token(turns: Sequence[Turn]) -> float:
    """Milliseconds after the first, mean over requests."""
    return sum(turn.tpot * len(turn.ttfts) for turn in turns) / sum(len(turn.ttfts) for turn in turns)


def ttft_at(percentile: float) -> Metric:
    """A percentile of the times to first token, ms."""
    return lambda turns: float(np.percentile([ttft for turn in turns for ttft in turn.ttfts], percentile))


def compared(pairs: Sequence[tuple[Turn, Turn]], of: Metric) -> tuple[float, float, float]:
    """Ratio of a metric over pairs of turns, first server to second: (value, 2.5%, 97.5%) by a bootstrap of pairs."""

    def ratio(drawn: np.ndarray) -> float:
        first, second = zip(*(pairs[int(index)] for index in drawn), strict=True)
        return of(first) / of(second)

    return interval(range(len(pairs)), lambda rows: np.apply_along_axis(ratio, -1, rows))


def shown(ratio: tuple[float, float, float], digits: int) -> str:
    """`value (low-high)`."""
    value, low, high = (f"{each:.{digits}f}" for each in ratio)
    return f"{value} ({low}-{high})"


Turns = Mapping[float, Mapping[str, Sequence[Turn]]]  # by load, then "ours" and "vllm"


def table(turns: Turns) -> list[str]:
    """Guiderail over `vllm serve` at each load, in Markdown."""
    lines = [
        "| load | throughput, Guiderail / vllm serve | target | | p99 TTFT | target | | median TTFT | time per token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for load, by_server in turns.items():
        pairs = list(zip(by_server["ours"], by_server["vllm"], strict=True))
        through, p99, median, each = (
            compared(pairs, of) for of in (throughput, ttft_at(99), ttft_at(50), time_per_token)
        )
        lines.append(
            f"| {load} of saturation | {shown(through, 3)} | >= 0.97 | {verdict(through[0], 0.97, at_most=False)} "
            f"| {shown(p99, 2)} | <= 1.05 | {verdict(p99[0], 1.05, at_most=True)} | {shown(median, 2)} | {shown(each, 2)} |"
        )
    return lines


def targets(turns: Turns) -> list[Target]:
    """The targets of throughput and p99 TTFT, each over all loads."""
    loads = ", ".join(str(load) for load in turns)
    pairs = [list(zip(by_server["ours"], by_server["vllm"], strict=True)) for by_server in turns.values()]
    through = [compared(each, throughput)[0] for each in pairs]
    p99 = [compared(each, ttft_at(99))[0] for each in pairs]
    return [
        Target(
            f"throughput, Guiderail / vllm serve, at {loads} of saturation",
            ">= 0.97", ", ".join(f"{each:.3f}" for each in through), min(through) >= 0.97,
        ),
        Target(
            f"p99 TTFT, Guiderail / vllm serve, at {loads} of saturation",
            "<= 1.05", ", ".join(f"{each:.2f}" for each in p99), max(p99) <= 1.05,
        ),
    ]  # fmt: skip
