"""Inference-time pessimism (Huang et al., arXiv 2503.21878): chi-squared-regularised selection by rejection.

The optimum of reward minus beta times a chi-squared divergence is pi0 relu((r - lambda) / beta), with lambda such
that it sums to 1. The first half of the candidates estimates lambda; the second half is sampled by rejection.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from guiderail.guides.scoring.kl import PoolKind, selection_kl
from guiderail.guides.scoring.selection.rule import Choice, Pool, Selection, drawn
from guiderail.guides.scoring.transforms import Array, Bounded

MAX_ROTATIONS = 256


def threshold(rewards: Array, beta: float) -> float:
    """Distance of lambda below the largest of the rewards, with mean_i relu((r_i - lambda) / beta) = 1.

    With the k largest active lambda is (sum of these - n beta) / k; the right k is the largest for which the k-th
    reward still exceeds it. Relative to the largest reward a tiny beta is not rounded away.
    """
    ordered = np.sort(rewards - rewards.max())[::-1]
    lambdas = (np.cumsum(ordered) - len(ordered) * beta) / np.arange(1, len(ordered) + 1)
    return -float(lambdas[np.flatnonzero(ordered > lambdas)[-1]])


class Pessimism(Selection):
    """Inference-time pessimism: accepts each fresh candidate with probability (r - lambda) / (r_max - lambda).

    Tends to pi0 relu((r - lambda) / beta): probabilities grow linearly, not exponentially, in the reward, so errors of
    the reward are exploited less, and its regret stays bounded as n grows, unlike best-of-N's. beta -> 0 gives the
    maximum, beta -> infinity a plain sample. Costs n L tokens and n scores, half of them for lambda alone; of the
    other half the first accepted is taken, or else the last, unseen, as a plain sample. Scores must not exceed
    r_max: it is 1 for one calibrated reward of weight 1.
    """

    name: Literal["pessimism"] = "pessimism"
    beta: Bounded = Field(default=0.1, gt=0, description="Weight of the divergence, in units of the combined reward.")
    valid_for: ClassVar[frozenset[PoolKind]] = frozenset({"answers", "blocks"})  # two independent halves
    r_max: Bounded = Field(description="Upper bound of the combined reward; 1 with one calibrated reward.")

    def check(self, n: int) -> None:
        if n < 3:
            raise ValueError(
                f"pessimism needs at least 3 candidates: for lambda, for a choice, to fall back on; not {n}"
            )

    async def pick(self, pool: Pool) -> Choice:
        n = len(pool.scores)
        top = float(pool.scores.max())
        if top > self.r_max:
            raise ValueError(f"a combined reward of {top:g} exceeds r_max {self.r_max:g}, which must bound them all")
        half = n // 2
        if half == 0:
            return Choice(0, pool.kl_of(0))
        first, fresh = pool.scores[:half], pool.scores[half:]
        depth = threshold(first, self.beta)
        lam = float(first.max()) - depth
        bound = depth + (self.r_max - float(first.max()))
        accept = np.maximum(fresh - first.max() + depth, 0.0) / bound  # at most 1, as no score exceeds r_max
        weights, left = first_accepted(accept)
        choice = drawn(pool, np.concatenate([np.zeros(half), weights]), {"lambda": lam, "fallback": left})
        if pool.origin is None or pool.origin.kind not in self.valid_for or pool.origin.drawn > n:
            return choice
        return replace(choice, kl=selection_kl(over_orders(accept)))


def first_accepted(accept: Array) -> tuple[Array, float]:
    """The chance [M] of each candidate to be the first accepted, or else the last, and that of the latter.

    `accept` [M] are the chances of acceptance; the last one's plays no part.
    """
    refused = np.concatenate([[1.0], np.cumprod(1 - accept[:-1])])
    return np.append(accept[:-1], 1.0) * refused, float(refused[-1])


def over_orders(accept: Array) -> Array:
    """The mean of `first_accepted` over rotations of the candidates.

    Draws come in any order alike, so it is the same choice, without the chance of their order: the KL of these
    weights bounds the choice's as that of any weights does, and no longer counts the order.
    """
    m = len(accept)
    mean = np.zeros(m)
    shifts = np.unique(np.linspace(0, m, min(m, MAX_ROTATIONS), endpoint=False).astype(int))
    for shift in shifts:
        mean += np.roll(first_accepted(np.roll(accept, -shift))[0], shift)
    mean /= len(shifts)
    return mean
