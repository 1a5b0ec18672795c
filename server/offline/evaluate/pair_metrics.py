"""Metrics of a reward on preference pairs: accuracy, calibration, and the influence of length.

All functions take float64 numpy arrays with one entry per pair, in the same order; lengths are tokens of the answer
alone. Pairs are taken as independent of each other.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BINS = 10
Z95 = 1.959963984540054  # two-sided 95 %


def credit(margins: Array) -> Array:
    """1 where the chosen answer has the larger value, 0 where the rejected has, 0.5 for a tie. [n] -> [n]."""
    result: Array = (np.sign(margins) + 1) / 2
    return result


def estimate(values: Array) -> dict[str, float]:
    """Mean of [n] values and its standard error, s / sqrt(n) with the sample deviation s (nan for n = 1)."""
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return {"value": float(np.mean(values)), "se": error}


def calibration(margins: Array, bins: int = BINS) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error of sigmoid(|margin|), the probability given to the answer ranked higher.

    That confidence lies in [0.5, 1], which is cut into equal bins; the error is the mean over pairs of
    |accuracy - mean confidence| of their bin (Naeini et al. 2015). Returns it with the bins that are not empty.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    hit = credit(margins)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows, error = [], 0.0
    for number in range(bins):
        inside = index == number
        if not inside.any():
            continue
        row = {
            "from": 0.5 + number / (2 * bins),
            "to": 0.5 + (number + 1) / (2 * bins),
            "pairs": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(hit[inside].mean()),
        }
        rows.append(row)
        error += row["pairs"] / len(margins) * abs(row["accuracy"] - row["confidence"])
    return error, rows


def pearson(x: Array, y: Array) -> float:
    """Linear correlation of [n] and [n]; nan where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan


def ranks(values: Array) -> Array:
    """Ranks from 0 of [n] values; equal ones get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    result: Array = ((ends - counts + ends - 1) / 2)[inverse]
    return result


def spearman(x: Array, y: Array) -> float:
    """Rank correlation of [n] and [n]; nan where one of them is constant."""
    return pearson(ranks(x), ranks(y))


def evaluate(chosen: Array, rejected: Array, chosen_length: Array, rejected_length: Array) -> dict[str, Any]:
    """All metrics of the held-out part from scores [n] and lengths [n] of both answers, ready for JSON."""
    margins = chosen - rejected
    longer_by = chosen_length - rejected_length
    hits, shorter, longer = credit(margins), credit(-longer_by), credit(longer_by)
    error, bins = calibration(margins)
    scores = np.concatenate([chosen, rejected])
    lengths = np.concatenate([chosen_length, rejected_length])
    return {
        "pairs": len(margins),
        "accuracy": estimate(hits),
        "shorter_wins": estimate(shorter),
        "longer_wins": estimate(longer),
        "minus_shorter_wins": estimate(hits - shorter),
        "minus_longer_wins": estimate(hits - longer),
        "log_loss": estimate(np.logaddexp(0, -margins)),
        "calibration_error": error,
        "calibration_bins": bins,
        "length": {
            "pearson": pearson(scores, lengths),
            "spearman": spearman(scores, lengths),
            "pearson_within_pairs": pearson(margins, longer_by),
            "spearman_within_pairs": spearman(margins, longer_by),
        },
    }


def wilson(credits: Array) -> dict[str, float]:
    """Mean of [n] values in [0, 1] with its 95 % interval (Wilson 1927). Halves, for ties, only widen it.
    An empty array gives nan."""
    n = len(credits)
    if n == 0:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "pairs": 0}
    share, square = float(credits.mean()), Z95**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    # At shares of 0 and 1 an end is the share itself, but for rounding.
    return {"value": share, "low": min(share, middle - half), "high": max(share, middle + half), "pairs": n}


def temperature(margins: Array) -> float | None:
    """The T > 0 that minimises the mean of log(1 + exp(-margin / T)), that is, the scale on which differences
    of the reward are most nearly log-odds of preference (Guo et al. 2017, arXiv 1706.04599, section 4.2).

    None if there is none: the reward ranks no better than chance, or ranks every pair correctly.
    """
    scale = float(np.abs(margins).max(initial=0.0))
    if scale == 0.0:
        return None
    unit = margins / scale

    def slope(inverse: float) -> float:
        """Minus the loss's derivative by 1/T, in units of the largest margin; it falls as 1/T grows."""
        return float(np.mean(unit * np.exp(-np.logaddexp(0.0, unit * inverse))))

    if slope(0.0) <= 0 or not (margins < 0).any():
        return None
    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return scale / high


def by_length(margins: Array, longer_by: Array) -> dict[str, dict[str, float]]:
    """Accuracy with its interval where the chosen answer is the longer, the shorter, or as long as the other.
    A reward without length bias has about the same in the first two."""
    hits = credit(margins)
    return {
        "chosen_longer": wilson(hits[longer_by > 0]),
        "chosen_shorter": wilson(hits[longer_by < 0]),
        "same_length": wilson(hits[longer_by == 0]),
    }


def distribution(values: Array) -> dict[str, float]:
    """Mean, standard deviation and quantiles of [n] scores."""
    quantiles = {f"q{round(100 * q):02d}": float(np.quantile(values, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    spread = {"mean": float(values.mean()), "sd": float(values.std()), "min": float(values.min())}
    return {**spread, **quantiles, "max": float(values.max())}
