"""Measured values as benchmarks state them: with a spread, and with the verdict on their target."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000


def interval(
    values: Sequence[float], how: Callable[[np.ndarray], np.ndarray] = lambda rows: rows.mean(axis=-1), seed: int = 0
) -> tuple[float, float, float]:
    """Return a statistic of values with the ends of its 95 % bootstrap interval. `how` reduces the last axis."""
    array = np.array(values, float)
    drawn = how(array[np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))])
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(how(array)), float(low), float(high)


def verdict(value: float, target: float, *, at_most: bool) -> str:
    """Return "met" or "**missed**", for the tables."""
    return "met" if (value <= target if at_most else value >= target) else "**missed**"


class Paired(NamedTuple):
    """Two sides that took turns: the median of each, and the median of b / a within pairs with the ends of its spread."""

    a: float
    b: float
    ratio: float
    low: float
    high: float


def paired(pairs: Sequence[Sequence[float]], *, by_interval: bool = False) -> Paired:
    """Summarise pairs (a, b). The spread of the ratio is its range, or the median's 95 % bootstrap interval."""
    ratios = [b / a for a, b in pairs]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    if by_interval:
        return Paired(a, b, *interval(ratios, lambda rows: np.median(rows, axis=-1)))
    return Paired(a, b, statistics.median(ratios), min(ratios), max(ratios))


def pair_table(
    a: str, b: str, spread: str, rows: Sequence[tuple[str, Paired, str, str]], *, targets: bool = True
) -> list[str]:
    """Markdown table of sides `a` and `b` from (case, its summary, unit, target and verdict as cells)."""
    lines = [f"| case | {a} | {b} | ratio | {spread} |", "|---|---|---|---|---|"]
    if targets:
        lines = [f"{lines[0]} target | |", f"{lines[1]}---|---|"]
    for name, each, unit, cells in rows:
        line = f"| {name} | {each.a:.4g} {unit} | {each.b:.4g} {unit} | {each.ratio:.3f} | {each.low:.3f}-{each.high:.3f} |"
        lines.append(f"{line} {cells} |" if targets else line)
    return lines
