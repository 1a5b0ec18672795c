"""The selection rules by name, and the plain ones: argmax, soft best-of-N, best-of-Poisson.

n is the number of candidates, L the tokens of one answer. Costs are those of a whole request, in generated tokens
and in scores per reward, and what a rule needs beyond them.
"""

import random
from typing import Literal

import numpy as np
from pydantic import Field

from guiderail.guides.pipeline.diagnostics import best_of_poisson_kl
from guiderail.guides.pipeline.divergence import FDivergence, softmax
from guiderail.guides.pipeline.pessimism import Pessimism
from guiderail.guides.pipeline.regularized import Likelihood, Mbr
from guiderail.guides.pipeline.rule import Choice, Pool, Selection, decided, drawn, first_best
from guiderail.guides.pipeline.tournament import Tournament

__all__ = ["SELECTIONS", "Argmax", "BestOfPoisson", "Choice", "Pool", "Selection", "Softmax"]


class Argmax(Selection):
    """The largest combined reward; among equals the first. With n candidates of one policy this is best-of-N.

    Law n u^(n - 1) in the quantile u of a continuous reward: win rate n / (n + 1) against the base policy at a KL of
    log n - (n - 1) / n (arXiv 2401.01879). As n grows it tends to the reward's maximum, errors of the reward
    included. Costs n L tokens and n scores.
    """

    name: Literal["argmax"] = "argmax"

    async def pick(self, pool: Pool) -> Choice:
        return decided(pool, first_best(pool.scores))


class Softmax(Selection):
    """Soft best-of-N: samples a candidate with probability proportional to exp(reward / beta).

    Tends to pi0 e^(r / beta), the KL-regularised optimum, with an error of order 1 / n (Verdun et al., arXiv
    2505.03156); beta -> 0 gives argmax. Costs n L tokens and n scores.
    """

    name: Literal["softmax"] = "softmax"
    beta: float = Field(default=0.1, gt=0, description="Temperature, in units of the combined reward.")

    async def pick(self, pool: Pool) -> Choice:
        return drawn(pool, softmax(pool.scores, self.beta))


class BestOfPoisson(Selection):
    """Best of a random number of candidates, 1 + Poisson(mu), drawn once a request and capped at the guide's n.

    Law (1 + mu u) e^(mu (u - 1)) in the quantile u (arXiv 2506.19248): close to the KL-regularised optimum of the
    quantile, with one number to tune (see hedge.py). Costs (1 + mu) L tokens and 1 + mu scores on average. It makes
    a difference for best_of_n alone: other guides draw what they draw, and it is argmax there.
    """

    name: Literal["best_of_poisson"] = "best_of_poisson"
    mu: float = Field(default=7.0, gt=0, le=4096, description="Mean number of candidates beyond the first.")

    def draws(self, n: int, seed: int | None) -> int:
        bits = random.Random(seed).getrandbits(64)  # a numpy seed must not be negative, a request's may be
        return min(n, 1 + int(np.random.default_rng(bits).poisson(self.mu)))

    async def pick(self, pool: Pool) -> Choice:
        detail = {"n": float(len(pool.scores))}
        return Choice(first_best(pool.scores), best_of_poisson_kl(self.mu), detail=detail)


SELECTIONS: dict[str, type[Selection]] = {
    "argmax": Argmax,
    "softmax": Softmax,
    "best_of_poisson": BestOfPoisson,
    "mbr": Mbr,
    "likelihood": Likelihood,
    "pessimism": Pessimism,
    "f_divergence": FDivergence,
    "tournament": Tournament,
}
