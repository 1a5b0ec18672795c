"""The report of an answer's selections: KL bound, how concentrated the choices were, signs of over-optimisation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from guiderail.guides.core.types import TokenLogprob
from guiderail.guides.scoring.calibration import CalibrationSample
from guiderail.guides.scoring.scores import Scores
from guiderail.guides.scoring.selection.rule import Choice
from guiderail.guides.scoring.transforms import Array

KL_LIMIT = 3.0  # nats; argmax over 54 candidates
OUTLIER_LIMIT = 6.0  # robust standard deviations above the median
MIN_POOL = 8  # candidates, below which medians and ranks say nothing
SAME = 1e-5  # relative difference of scores that are the same up to rounding
HIGH, LOW = 0.9, 0.1  # quantiles


@dataclass(slots=True)
class SelectionReport:
    """Adds up over the selections of one answer: one for best-of-N, one a step for guides that search.

    `kl` bounds in nats the KL of the answer from the policy (kl.py), or None: not known.
    """

    picks: int = 0
    effective_sample_size: float | None = None
    detail: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, dict[str, str | int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _kl: float | None = None
    _unknown: bool = False

    @property
    def kl(self) -> float | None:
        """The sum over the answer's selections; None if one is not known, or none was reported."""
        return None if self._unknown else self._kl

    @property
    def warnings(self) -> list[str]:
        """All that a user should know, each once."""
        far = moved_far(self.kl)
        return [*([] if far is None else [far]), *self.notes]

    def moved(self, kl: float | None) -> None:
        """Note the choice of a part of the answer, at this KL from the policy. Successive parts add up (chain rule)."""
        self._unknown |= kl is None
        self._kl = (self._kl or 0.0) + (kl or 0.0)

    def calibrated(self, label: str, sample: CalibrationSample) -> None:
        """Note that a reward was calibrated on this sample."""
        self.calibration[label] = {"source": sample.source, "n": len(sample.values)}

    def warn(self, text: str) -> None:
        """Add a warning, once."""
        if text not in self.notes:
            self.notes.append(text)

    def least(self, name: str, value: float) -> None:
        """Note the smallest value so far of a metric of the guide's own."""
        self.detail[name] = min(value, self.detail.get(name, value))

    def picked(self, scores: Scores, choice: Choice) -> None:
        """Note a selection among scored candidates."""
        self.picks += 1
        self.moved(choice.kl)
        self.detail |= choice.detail
        if choice.weights is not None:
            size = effective_sample_size(choice.weights)
            self.effective_sample_size = min(size, self.effective_sample_size or size)
        for warning in (*choice.warnings, *over_optimised(scores, choice.index)):
            self.warn(warning)


def effective_sample_size(weights: Array) -> float:
    """(sum w)^2 / sum w^2: the number of equal weights that these amount to, from 1 to their number."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def token_entropy(logprobs: Sequence[TokenLogprob] | None) -> dict[str, float | None]:
    """The policy's uncertainty, as means over the tokens that list their likeliest alternatives; None if none does.

    `token_entropy` (nats) is that of the distribution over these tokens and "any other", a lower bound of the whole
    one's; `top_mass` is the probability they hold together.
    """
    entropies, masses = [], []
    for token in logprobs or ():
        if not token.top:
            continue
        p = np.exp([logprob for _, logprob in token.top])
        mass = min(1.0, float(p.sum()))
        outcomes = np.append(p, 1.0 - mass)
        outcomes = outcomes[outcomes > 0]
        entropies.append(-float((outcomes * np.log(outcomes)).sum()))
        masses.append(mass)
    if not masses:
        return {"token_entropy": None, "top_mass": None}
    return {"token_entropy": math.fsum(entropies) / len(entropies), "top_mass": math.fsum(masses) / len(masses)}


def moved_far(kl: float | None) -> str | None:
    """The warning that an answer's selections together may have moved more than 3 nats from the policy, or None.

    Proxy and true reward part as KL grows (Gao et al., arXiv 2210.10760).
    """
    if kl is None or kl <= KL_LIMIT:
        return None
    return f"the selection moved up to {kl:.2f} nats from the base policy, more than {KL_LIMIT:g}"


def over_optimised(scores: Scores, index: int) -> list[str]:
    """Signs that the choice of candidate `index` went for a reward's errors and not what it measures; none is proof.

    - The chosen one's combined score is more than 6 robust standard deviations (1.4826 x the median absolute
      deviation) above the median: such scores are more often mistakes than gems. Only of at least 8 different scores,
      and each counted once: where many answers are equal, as short ones are, their scores are no measure of spread.
    - The chosen one is among the best tenth of at least 8 candidates under one reward and among the worst tenth
      under another. Rewards of negative weight are to be small, those of weight 0 are ignored.
    """
    warnings: list[str] = []
    if len(scores.plain) < MIN_POOL:
        return warnings
    z = _robust_z(scores.combined, index)
    if z > OUTLIER_LIMIT:
        warnings.append(f"the chosen score is an outlier, {z:.1f} robust standard deviations above the median")
    ranks = {}
    for label, column in scores.transformed.items():
        weight = scores.combination.weights[label]
        if weight != 0:
            values = math.copysign(1.0, weight) * column
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
    rounding = SAME * _median(np.abs(different))
    different = different[np.append(True, np.diff(different) > rounding)]
    if len(different) < MIN_POOL or 2 * len(different) < len(scores):
        return 0.0
    median = _median(different)
    return float(scores[index] - median) / (1.4826 * _median(np.abs(different - median)))


def _median(values: Array) -> float:
    """The median of a few finite values, for which np.median takes ten times as long."""
    ordered, middle = np.sort(values), len(values) // 2
    return float(ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2)
