"""The selection rules by name, and those that soften argmax: soft best-of-N, best-of-Poisson.

n is the number of candidates, L the tokens of one answer. Costs are those of a whole request, in generated tokens
and in scores per reward, and what a rule needs beyond them. Which pools a rule is valid for it says in `valid_for`.
"""

import random
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from guiderail.guides.scoring.kl import PoolKind, best_of_poisson_kl
from guiderail.guides.scoring.selection.divergence import FDivergence, softmax
from guiderail.guides.scoring.selection.pessimism import Pessimism
from guiderail.guides.scoring.selection.regularized import Likelihood, Mbr
from guiderail.guides.scoring.selection.rule import Argmax, Choice, Pool, Selection, decided
from guiderail.guides.scoring.selection.target import ALMOST, MAX_MU, UNATTAINED, Nats, Target, either, mu_for
from guiderail.guides.scoring.selection.tournament import Tournament

__all__ = ["SELECTIONS", "Argmax", "BestOfPoisson", "Choice", "Pool", "Selection", "Softmax"]


class Softmax(Target):
    """Soft best-of-N: samples a candidate with probability proportional to exp(reward / beta).

    Tends to pi0 e^(r / beta), the KL-regularised optimum, with an error of order 1 / n (Verdun et al., arXiv
    2505.03156); beta -> 0 gives argmax. With `kl` in place of beta, beta is the one at which the weights of this pool
    are that far from equal ones (target.py). Enumerated tokens have the policy's probability in their score. Costs n L
    tokens and n scores.
    """

    name: Literal["softmax"] = "softmax"
    valid_for: ClassVar[frozenset[PoolKind]] = frozenset({"answers", "blocks", "tokens"})

    def at(self, temperature: float) -> Selection:
        if self.beta is None:  # what the choice is to cost was asked for: no temperature changes that
            return self
        beta = self.beta * temperature
        return self.model_copy(update={"beta": beta}) if beta else Argmax()

    async def pick(self, pool: Pool) -> Choice:
        return self.draw(pool, lambda beta: softmax(pool.scores, beta))


class BestOfPoisson(Selection):
    """Best of a random number of candidates, 1 + Poisson(mu), drawn once a request and capped at the guide's n.

    Density (1 + mu u) e^(mu (u - 1)) in the quantile u (arXiv 2506.19248): close to the KL-regularised optimum of the
    quantile, with one number to tune (see hedge.py). `kl` in place of mu asks for the mu of that KL, at the guide's n.
    Costs (1 + mu) L tokens and 1 + mu scores on average. It says how many answers are drawn, so it goes with
    best_of_n alone.
    """

    name: Literal["best_of_poisson"] = "best_of_poisson"
    valid_for: ClassVar[frozenset[PoolKind]] = frozenset({"answers"})
    mu: float | None = Field(
        default=None, gt=0, le=MAX_MU, description="Mean number of candidates beyond the first; 7 unless kl is given."
    )
    kl: Nats | None = Field(default=None, description="KL from the policy to aim at, in nats, in place of mu.")

    @model_validator(mode="before")
    @classmethod
    def _one(cls, data: object) -> object:
        return either(data, "mu", 7.0)

    def mean(self, n: int) -> float:
        """The mu for a guide that draws at most n."""
        return self.mu if self.mu is not None else mu_for(self.kl or 0.0, n)

    def draws(self, n: int, seed: int | None) -> int:
        bits = random.Random(seed).getrandbits(64)  # a numpy seed must not be negative, a request's may be
        return min(n, 1 + int(np.random.default_rng(bits).poisson(self.mean(n))))

    async def pick(self, pool: Pool) -> Choice:
        choice = decided(pool, pool.best(), detail={"n": float(len(pool.scores))})
        if pool.origin is None or pool.origin.at_most is None:
            return choice
        mu = self.mean(pool.origin.at_most)
        kl = best_of_poisson_kl(mu, pool.origin.at_most)
        asked = {} if self.kl is None else {"mu": mu, "kl_asked": self.kl, "kl_obtained": kl}
        short = (UNATTAINED,) if self.kl is not None and kl < self.kl * ALMOST else ()
        return replace(choice, kl=kl, detail={**choice.detail, **asked}, warnings=short)


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
