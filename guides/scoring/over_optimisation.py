"""Warnings that a selection may have gone for a reward's errors: far from the policy, an outlier, a disagreement."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from guiderail.guides.core.types import Candidate
from guiderail.guides.scoring.transforms import Array

KL_LIMIT = 3.0  # nats; argmax over 54 candidates
OUTLIER_LIMIT = 6.0  # robust standard deviations above the median
MIN_POOL = 8  # candidates, below which medians and ranks say nothing
SAME = 1e-5  # relative difference of scores that are the same up to rounding
HIGH, LOW = 0.9, 0.1  # quantiles


def moved_far(kl: float | None) -> str | None:
    """The warning that an answer's selections together may have moved more than 3 nats from the policy, or None.

    Proxy and true reward part as KL grows (Gao et al., arXiv 2210.10760).
    """
    if kl is None or kl <= KL_LIMIT:
        return None
    return f"the selection moved up to {kl:.2f} nats from the base policy, more than {KL_LIMIT:g}"


def over_optimised(
    candidates: Sequence[Candidate], index: int, weights: Mapping[str, float] | None = None
) -> list[str]:
    """Signs that the choice of candidate `index` went for a reward's errors and not what it measures; none is proof.

    - The chosen one's combined score is more than 6 robust standard deviations (1.4826 x the median absolute
      deviation) above the median: such scores are more often mistakes than gems. Only of at least 8 different scores,
      and each counted once: where many answers are equal, as short ones are, their scores are no measure of spread.
    - The chosen one is among the best tenth of at least 8 candidates under one reward and among the worst tenth
      under another. `weights` by label tell which rewards are to be small (negative) or ignored (0).
    """
    warnings: list[str] = []
    scores = [c.combined for c in candidates if c.combined is not None]
    if len(candidates) < MIN_POOL or len(scores) < len(candidates):
        return warnings
    z = _robust_z(np.array(scores), index)
    if z > OUTLIER_LIMIT:
        warnings.append(f"the chosen score is an outlier, {z:.1f} robust standard deviations above the median")
    ranks = {}
    for label in candidates[index].transformed:
        weight = 1.0 if weights is None else weights[label]
        if weight != 0:
            values = math.copysign(1.0, weight) * np.array([c.transformed[label] for c in candidates])
            own = values[index]
            ranks[label] = float(((values < own).sum() + (values <= own).sum()) / (2 * len(values)))
    if ranks and max(ranks.values()) >= HIGH and min(ranks.values()) <= LOW:
        best, worst = max(ranks, key=ranks.__getitem__), min(ranks, key=ranks.__getitem__)
        warnings.append(f"rewards disagree: the chosen answer is among the best by '{best}', the worst by '{worst}'")
    return warnings


def _robust_z(scores: Array, index: int) -> float:
    """Of the score at `index` among the different scores; 0 where these are too few to measure a spread by.

    Scores that differ by rounding alone count as one: equal answers may have them.
    """
    different = np.unique(scores)
    rounding = SAME * float(np.median(np.abs(different)))
    different = different[np.append(True, np.diff(different) > rounding)]
    if len(different) < MIN_POOL or 2 * len(different) < len(scores):
        return 0.0
    median = np.median(different)
    return float(scores[index] - median) / (1.4826 * float(np.median(np.abs(different - median))))
