"""Metrics of `guiderail evaluate partial-correlation`: how well partial rewards predict final ones.

For P prompts with M answers each: `final` [P, M] are the rewards of whole answers, `partial` [P, M, C] those of
their beginnings at C checkpoints, `lengths` [P, M] the answers' tokens. An answer that has ended by a checkpoint
has its final reward there.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
RESAMPLES = 2000


def kendall(x: Array, y: Array) -> float:
    """Kendall's tau-b of [n] and [n], from -1 to 1; nan where one of them is constant.

    tau_b = (concordant - discordant pairs) / sqrt(pairs that differ in x * pairs that differ in y)
    (Kendall 1945, "The treatment of ties in ranking problems"): the cosine between the signs of all differences.
    """
    a, b = np.sign(np.subtract.outer(x, x)), np.sign(np.subtract.outer(y, y))
    differ = float((a * a).sum()) * float((b * b).sum())
    return float((a * b).sum()) / math.sqrt(differ) if differ > 0 else math.nan


def best(values: Array, alpha: float) -> Ints:
    """Indices [K] that survive the rejection of the lower alpha-quantile of [n] values, ascending.

    As in guides/speculative_rejection.py: round((1 - alpha) n) of them, at least one; the first of equal values.
    """
    order = np.argsort(-values, kind="stable")[: max(1, round((1 - alpha) * len(values)))]
    return np.sort(order)


def reject(final: Array, partial: Array, lengths: Ints, checkpoints: Sequence[int], alpha: float) -> tuple[Ints, int]:
    """Speculative rejection of one prompt's pool: the survivors [K], and the tokens that all answers took.

    final [M], partial [M, C], lengths [M]. Tokens generated while partial answers are scored are not counted.
    """
    alive, tokens = np.arange(len(final)), 0
    for column, checkpoint in enumerate(checkpoints):
        if not (lengths[alive] > checkpoint).any():
            break  # every remaining answer is complete
        kept = alive[best(partial[alive, column], alpha)]
        tokens += int(np.minimum(lengths[np.setdiff1d(alive, kept)], checkpoint).sum())
        alive = kept
    return alive, tokens + int(lengths[alive].sum())


def partial_metrics(
    final: Array, partial: Array, lengths: Ints, checkpoints: Sequence[int], alpha: float, seed: int
) -> dict[str, Any]:
    """The metrics for report.json, with 95 % bootstrap intervals over prompts; checkpoints ascending."""
    rng = np.random.default_rng(seed)
    top = final.max(axis=1)
    rows = []
    for column, checkpoint in enumerate(checkpoints):
        taus = np.array([kendall(p, f) for p, f in zip(partial[:, :, column], final, strict=True)])
        kept = [best(p, alpha) for p in partial[:, :, column]]
        left = np.array([f[k].max() for f, k in zip(final, kept, strict=True)])
        rows.append({
            "tokens": checkpoint,
            "ended": float((lengths <= checkpoint).mean()),
            "tau": band(taus[~np.isnan(taus)], rng),
            "winner_survives": band((left == top).astype(float), rng),
            "reward_of_best_survivor": band(left, rng),
        })  # fmt: skip
    return {
        "alpha": alpha,
        "checkpoints": rows,
        "all_checkpoints": rejection_metrics(final, partial, lengths, checkpoints, alpha, rng),
    }


def rejection_metrics(
    final: Array, partial: Array, lengths: Ints, checkpoints: Sequence[int], alpha: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Shares of best-of-M's reward and tokens that rejecting at every checkpoint in turn would have kept."""
    top = final.max(axis=1)
    found, spent = [], []
    for each, beginning, length in zip(final, partial, lengths, strict=True):
        alive, tokens = reject(each, beginning, length, checkpoints, alpha)
        found.append(each[alive].max())
        spent.append(tokens)
    reached = np.array(found)
    gain, gain_of_best = reached - final.mean(axis=1), top - final.mean(axis=1)
    return {
        "winner_survives": band((reached == top).astype(float), rng),
        "reward": band(reached, rng),
        "best_of_m": band(top, rng),
        "plain": band(final.mean(axis=1), rng),
        "gain_kept": ratio(gain, gain_of_best, rng),
        "tokens_share": ratio(np.array(spent, float), lengths.sum(axis=1).astype(float), rng),
    }


def band(values: Array, rng: np.random.Generator) -> dict[str, Any]:
    """Mean of one value per prompt, with the 2.5 % and 97.5 % quantiles of its bootstrap; nan for no prompt."""
    if not len(values):
        return {"value": math.nan, "low": math.nan, "high": math.nan, "prompts": 0}
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "prompts": len(values)}


def ratio(above: Array, below: Array, rng: np.random.Generator) -> dict[str, Any]:
    """Ratio of the means over prompts of [P] and [P], with its bootstrap interval; nan where the second is 0."""
    if not below.mean() > 0:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "prompts": len(below)}
    picks = rng.integers(len(below), size=(RESAMPLES, len(below)))
    drawn = above[picks].mean(axis=1), below[picks].mean(axis=1)
    ratios = drawn[0][drawn[1] > 0] / drawn[1][drawn[1] > 0]
    low, high = np.quantile(ratios, (0.025, 0.975))
    value = float(above.mean() / below.mean())
    return {"value": value, "low": float(low), "high": float(high), "prompts": len(below)}
