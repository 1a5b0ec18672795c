"""Combinations: from the transformed rewards of a group of candidates to one score each, larger being better.

A combination is called with values [C, R] of C candidates under R rewards, their weights [R] and labels. Equal rows
get equal scores. What a weight means differs, and each class says it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from guiderail.guides.core.types import Fields
from guiderail.guides.scoring.chain import Chain
from guiderail.guides.scoring.maxmin import maxmin_dual
from guiderail.guides.scoring.transforms import Array, Bounded, LogSigmoid, checked, weighted_sum


class Combine(Fields, ABC):
    """A way to make one score of several rewards.

    `default_chain` is what a reward without a transform of its own gets; None leaves it raw. `pointwise` says
    whether a candidate's score is independent of the other candidates.
    """

    name: str
    default_chain: ClassVar[Chain | None] = None
    pointwise: ClassVar[bool] = True

    def combine(self, values: Array, weights: Array, labels: Sequence[str]) -> Array:
        """Scores [C]. Raises ValueError for values or weights that are not finite, or that `check` would refuse."""
        values, weights = checked(values), checked(weights)
        if values.ndim != 2 or values.shape[1:] != (len(labels),) or weights.shape != (len(labels),):
            raise ValueError(f"values {values.shape} and weights {weights.shape} do not fit {len(labels)} rewards")
        self.check_weights(labels, weights.tolist())
        return self._combine(values, weights, labels)

    def ties(self, raw: Array, weights: Array, labels: Sequence[str]) -> Array:
        """Order of candidates of equal score, [C], from their raw rewards [C, R]: the weighted sum of raw ranks.

        Transforms make ties, and with one reward the raw value undoes them. With several there is no exchange rate
        between raw values, which is why they were transformed; ranks among the candidates have a unit in common.
        """
        return weighted_sum(np.stack([_ranks(column) for column in raw.T], axis=1), weights / np.abs(weights).max())

    @abstractmethod
    def _combine(self, values: Array, weights: Array, labels: Sequence[str]) -> Array: ...

    def check(self, labels: Sequence[str], chains: Sequence[Chain], weights: Sequence[float]) -> None:
        """Raises ValueError, for people, if rewards with these labels, transforms and weights do not go together."""
        self.check_weights(labels, weights)

    def check_weights(self, labels: Sequence[str], weights: Sequence[float]) -> None:
        """The part of `check` that looks at labels and weights."""


def _ranks(column: Array) -> Array:
    """0 for the smallest of the values [C], 1 for the next one that differs, and so on."""
    return np.unique(column, return_inverse=True)[1].reshape(-1).astype(np.float64)


def _positive(name: str, labels: Sequence[str], weights: Sequence[float]) -> None:
    for label, weight in zip(labels, weights, strict=True):
        if weight <= 0:
            raise ValueError(f"'{name}' needs positive weights; that of '{label}' is {weight:g}")


class Sum(Combine):
    """Weighted sum. A weight is the exchange rate of its reward, of either sign; 0 only reports it."""

    name: Literal["sum"] = "sum"

    def _combine(self, values: Array, weights: Array, labels: Sequence[str]) -> Array:
        return weighted_sum(values, weights)


class And(Combine):
    """Sum of log-sigmoids: log P(good in all), for properties independent given prompt and answer.

    A weight is an exponent: P(good)^weight, so 2 counts a property as if it were two, and 0 only reports it.
    A well-served property saturates at log 1 = 0 and cannot make up for a badly served one (arXiv 2402.00742).
    """

    name: Literal["and"] = "and"
    default_chain: ClassVar[Chain | None] = Chain((LogSigmoid(),))

    def _combine(self, values: Array, weights: Array, labels: Sequence[str]) -> Array:
        return weighted_sum(values, weights)

    def check(self, labels: Sequence[str], chains: Sequence[Chain], weights: Sequence[float]) -> None:
        super().check(labels, chains, weights)
        for label, chain in zip(labels, chains, strict=True):
            if not chain.steps or not isinstance(chain.steps[-1], LogSigmoid):
                raise ValueError(f"'and' adds log-probabilities: the transform of '{label}' must end in log_sigmoid")

    def check_weights(self, labels: Sequence[str], weights: Sequence[float]) -> None:
        for label, weight in zip(labels, weights, strict=True):
            if weight < 0:
                raise ValueError(f"'and' needs weights of at least 0; that of '{label}' is {weight:g}")


class MaxMin(Combine):
    """Serves the worst-off group in expectation, as MaxMin-RLHF: the weighted sum that solves its dual (maxmin.py).

    With w* the dual's solution the score is sum_u w*_u weight_u r_u. Selected by softmax at the same beta the answer
    follows the max-min policy over the candidates; argmax takes its most probable answer. A weight rescales its
    reward before the minimum is taken: a change of unit, not an importance. Calibrate the rewards first, or the one
    of the largest scale never binds.
    """

    name: Literal["maxmin"] = "maxmin"
    beta: Bounded = Field(default=0.1, gt=0, description="Weight of the KL from the base policy, in the rewards' unit.")
    pointwise: ClassVar[bool] = False

    def dual(self, values: Array, weights: Array) -> tuple[Array, float]:
        """(w* [R] on the simplex, duality gap in the rewards' unit) for values [C, R]."""
        return maxmin_dual(checked(values) * weights, self.beta)

    def _combine(self, values: Array, weights: Array, labels: Sequence[str]) -> Array:
        w, _ = self.dual(values, weights)
        return weighted_sum(values, w * weights)

    def check_weights(self, labels: Sequence[str], weights: Sequence[float]) -> None:
        _several(self.name, labels)
        _positive(self.name, labels, weights)


class PointwiseMin(Combine):
    """min_u weight_u r_u, answer by answer. Stricter than maxmin, which takes the minimum of expectations.

    A weight rescales its reward before the minimum is taken: a change of unit, not an importance.
    """

    name: Literal["pointwise_min"] = "pointwise_min"

    def _combine(self, values: Array, weights: Array, labels: Sequence[str]) -> Array:
        worst: Array = (values * weights).min(axis=1)
        return worst

    def check_weights(self, labels: Sequence[str], weights: Sequence[float]) -> None:
        _several(self.name, labels)
        _positive(self.name, labels, weights)


def _several(name: str, labels: Sequence[str]) -> None:
    if len(labels) < 2:
        raise ValueError(f"'{name}' compares rewards: it needs at least two")


class Constraints(Combine):
    """Maximises one reward subject to floors on the others, all after their transforms.

    A candidate that keeps every floor scores its objective. One that does not scores below all that do: by total
    violation first, sum_r weight_r max(0, floor_r - r), then by objective, in steps that are each larger than the
    spread of the feasible objectives. A weight is the price of violating its floor; the objective's is not used.
    """

    name: Literal["constraints"] = "constraints"
    objective: str = Field(description="Label of the reward to maximise.")
    floors: dict[str, Bounded] = Field(
        min_length=1, description="Least acceptable value of each other reward, by label."
    )
    pointwise: ClassVar[bool] = False

    def _combine(self, values: Array, weights: Array, labels: Sequence[str]) -> Array:
        goal = values[:, labels.index(self.objective)]
        floors = [(labels.index(label), floor) for label, floor in self.floors.items()]
        feasible = np.all([values[:, column] >= floor for column, floor in floors], axis=0)
        scores = goal.copy()
        kept = goal[feasible] if feasible.any() else np.zeros(1)
        step = 1.0 + float(np.ptp(kept)) + float(np.abs(kept).max())
        broken = values[~feasible]
        violation = np.zeros(len(broken))
        for column, floor in floors:
            lack = np.maximum(0.0, floor - broken[:, column])
            if (lack > 0).all():  # then the floor is the same to all of them, and far off it would round the rest away
                lack = -broken[:, column]
            violation += weights[column] * lack
        keys = np.stack([violation, -goal[~feasible]], axis=1)
        _, rank = np.unique(keys, axis=0, return_inverse=True)  # in order of violation, then of objective
        scores[~feasible] = float(kept.min()) - step * (1 + rank.reshape(-1))
        return scores

    def check_weights(self, labels: Sequence[str], weights: Sequence[float]) -> None:
        for label in (self.objective, *self.floors):
            if label not in labels:
                raise ValueError(f"'constraints' names '{label}'; the rewards are {', '.join(labels)}")
        if self.objective in self.floors:
            raise ValueError(f"'constraints' puts a floor on its own objective '{self.objective}'")
        for label in labels:
            if label != self.objective and label not in self.floors:
                raise ValueError(f"'constraints' needs a floor for '{label}', which is not the objective")
        _positive(self.name, labels, weights)


COMBINES: dict[str, type[Combine]] = {
    "sum": Sum,
    "and": And,
    "maxmin": MaxMin,
    "pointwise_min": PointwiseMin,
    "constraints": Constraints,
}
