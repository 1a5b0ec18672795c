"""A figure as benchmarks state it: with its bootstrap interval, and whether its target was met."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 4000


def interval(
    values: Sequence[float], how: Callable[[np.ndarray], np.ndarray] = lambda rows: rows.mean(axis=-1), seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of values, one a prompt say, with its 95 % bootstrap interval over them. `how` reduces the last axis."""
    array = np.array(values, float)
    drawn = how(array[np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))])
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(how(array)), float(low), float(high)


def verdict(value: float, target: float, *, at_most: bool) -> str:
    """Whether a target was met, for the tables."""
    return "met" if (value <= target if at_most else value >= target) else "**missed**"
