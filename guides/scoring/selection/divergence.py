"""Selection weights that trade the reward against an f-divergence from the candidates' own, uniform distribution.

The weights maximise sum_i w_i r_i - beta D_f(w || uniform) over the simplex, with D_f = mean_i f(n w_i). Where f is
smooth, w_i = (f')^-1((r_i - nu) / beta) / n with nu such that they sum to 1. In x_i = (max r - r_i) / beta and
s = (nu - max r) / beta, for t = n w:
  reverse_kl        f = t log t                                   t = e^-x / mean(e^-x), soft best-of-N
  forward_kl        f = -log t                                    t = 1 / (s + x),  1/n <= s <= 1
  jensen_shannon    f = (t log t - (1 + t) log((1 + t) / 2)) / 2  t = 1 / (2 e^(2 (x + s)) - 1),
                                                                  -log(2n / (n + 1)) / 2 <= s <= 0
  total_variation   f = |t - 1| / 2                               t = 1 where 0 < x <= 1, 0 where x > 1, and what
                                                                  those lose goes to the best, x = 0
The means of t fall as s grows, so nu is found by bisection. A shift of mass to the best costs beta a unit in total
variation, so candidates at x = 1 exactly could go either way: they stay. Wang et al., arXiv 2309.16240, have the
same family for training.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from guiderail.guides.scoring.kl import PoolKind
from guiderail.guides.scoring.selection.rule import Choice, Pool
from guiderail.guides.scoring.selection.target import Target
from guiderail.guides.scoring.transforms import Array

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "total_variation"]
HALVINGS = 60


def softmax(scores: Array, beta: float) -> Array:
    """exp(scores / beta), normalised."""
    mass: Array = np.exp(-_below_best(scores, beta))
    mass /= mass.sum()
    return mass


def _below_best(scores: Array, beta: float) -> Array:
    with np.errstate(over="ignore"):  # infinitely far below the best means no weight
        below: Array = (scores.max() - scores) / beta
    return below


def f_divergence_weights(scores: Array, divergence: Divergence, beta: float) -> Array:
    """The weights [n] for finite `scores` [n] and beta > 0, in the scores' unit."""
    x, n = _below_best(scores, beta), len(scores)
    weights: Array
    match divergence:
        case "reverse_kl":
            return softmax(scores, beta)
        case "forward_kl":
            weights = _balanced(lambda s: 1 / (s + x), 1 / n, 1.0)
        case "jensen_shannon":
            low = -math.log(2 * n / (n + 1)) / 2
            weights = _balanced(lambda s: 1 / (2 * np.exp(np.minimum(2 * (x + s), 700.0)) - 1), low, 0.0)
        case "total_variation":
            weights = np.where(x <= 1, 1.0, 0.0)
            weights[x == 0] += (n - weights.sum()) / (x == 0).sum()
    weights /= weights.sum()
    return weights


def _balanced(t: Callable[[float], Array], low: float, high: float) -> Array:
    """t(s) for the s between low and high at which its mean, which falls with s, is 1."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if t(middle).mean() > 1:
            low = middle
        else:
            high = middle
    return t(high)


class FDivergence(Target):
    """Samples a candidate by weights that maximise reward minus beta times an f-divergence from the base policy.

    Tends to pi0 (f')^-1((r - nu) / beta) as n grows. reverse_kl is soft best-of-N. forward_kl has heavy tails: a
    candidate d below the best keeps a chance of at least beta / (n (beta + d)). jensen_shannon, which is bounded, lies
    between. total_variation moves all mass from candidates more than beta below the best to the best, and leaves the
    rest alone. beta -> 0 gives argmax, beta -> infinity a plain sample. With `kl` in place of beta, beta is the one at
    which the weights are that far, in reverse KL, from equal ones (target.py); total_variation's move in jumps, and
    the last one before kl is taken. The weights compare candidates with equal ones, so those must be draws of the
    policy. Costs n L tokens and n scores.
    """

    name: Literal["f_divergence"] = "f_divergence"
    divergence: Divergence = Field(description="Which divergence is paid for.")
    valid_for: ClassVar[frozenset[PoolKind]] = frozenset({"answers", "blocks"})

    async def pick(self, pool: Pool) -> Choice:
        return self.draw(pool, lambda beta: f_divergence_weights(pool.scores, self.divergence, beta))
