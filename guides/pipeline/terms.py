"""combine -> select: from raw rewards to the chosen candidate, as small pure functions.

A monotone change of a single reward never changes which candidate has the largest value; weights
matter once rewards are summed, and the scale of a reward matters once candidates are sampled.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """One reward of a request: which, with which parameters, and its weight in the sum.

    `label` names its values in the response (the reward's name unless the request says otherwise).
    """

    name: str
    label: str
    weight: float
    params: Any


def combine(terms: Sequence[RewardTerm], values: Mapping[str, float]) -> float:
    """Weighted sum of one candidate's raw rewards, by label."""
    return math.fsum(term.weight * values[term.label] for term in terms)


class Argmax(BaseModel):
    """Picks the largest combined reward; among equals the first. With one policy this is best-of-N."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["argmax"] = "argmax"

    def pick(self, scores: Sequence[float], seed: int | None) -> int:
        """Index of the choice among `scores`, which must be finite. `seed` is not used."""
        return max(range(len(scores)), key=scores.__getitem__)


class Softmax(BaseModel):
    """Soft best-of-N: samples a candidate with probability proportional to exp(reward / beta).

    Tends to pi0 * exp(r / beta) as N grows (algorithms: Soft Best-of-N); beta -> 0 gives argmax.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: Literal["softmax"] = "softmax"
    beta: float = Field(default=0.1, gt=0, description="Temperature, in units of the combined reward.")

    def pick(self, scores: Sequence[float], seed: int | None) -> int:
        """Index of the sampled choice; the same seed and scores give the same choice."""
        top = max(scores)
        weights = [math.exp((score - top) / self.beta) for score in scores]
        return random.Random(seed).choices(range(len(scores)), weights)[0]


Selection = Argmax | Softmax
