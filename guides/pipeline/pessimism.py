"""Inference-time pessimism (Huang et al., arXiv 2503.21878): chi-squared-regularised selection by rejection.

The optimum of reward minus beta times a chi-squared divergence is pi0 relu((r - lambda) / beta), with lambda such
that it is a law. The first half of the candidates estimates lambda; the second half is sampled by rejection.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from guiderail.guides.pipeline.diagnostics import best_of_n_kl
from guiderail.guides.pipeline.rule import Choice, Pool, Selection, drawn
from guiderail.guides.pipeline.steps import Array, Bounded


def threshold(rewards: Array, beta: float) -> float:
    """How far lambda lies below the largest of the rewards, with mean_i relu((r_i - lambda) / beta) = 1.

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
            return Choice(0, 0.0)
        first, fresh = pool.scores[:half], pool.scores[half:]
        depth = threshold(first, self.beta)
        lam = float(first.max()) - depth
        bound = depth + (self.r_max - float(first.max()))
        accept = np.maximum(fresh - first.max() + depth, 0.0) / bound  # at most 1, as no score exceeds r_max
        accept[-1] = 1.0
        refused = np.concatenate([[1.0], np.cumprod(1 - accept[:-1])])
        weights = np.concatenate([np.zeros(half), accept * refused])
        density = np.maximum(first - first.max() + depth, 0.0) / self.beta  # of the target law to the base policy
        held = density[density > 0]
        kl = min(float((held * np.log(held)).sum() / half), best_of_n_kl(len(fresh)))
        choice = drawn(pool, weights)
        return Choice(choice.index, kl, weights=weights, detail={"lambda": lam, "fallback": float(refused[-1])})
