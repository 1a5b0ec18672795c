"""Selection rules whose strength is given by a temperature or by the KL from the policy that it is to cost.

A rule with weights w(beta) over the candidates is asked for beta, or for a KL: then beta is solved for on each pool, so
that sum w log(C w) is the KL asked for. (InfAlign's transforms are compared at a KL, and the beta that belongs to one
depends on the transform: arXiv 2412.19792.) For weights that grow with the score through (f')^-1((r - nu) / beta) those
at a smaller beta majorise those at a larger one: as functions of r they cross once, and they have the same sum. So the
KL falls as beta grows, from log(C / the number of the best) to 0, and bisection finds it. Where the target lies beyond
the first, the weights are argmax's, and diagnostics say what was obtained.

As every pool has the KL that was asked for, or less, it bounds the choice's without a mean over pools.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from guiderail.guides.scoring.kl import best_of_poisson_kl, selection_kl
from guiderail.guides.scoring.selection.rule import Choice, Pool, Selection, drawn
from guiderail.guides.scoring.transforms import Array

Nats = Annotated[float, Field(gt=0, le=100)]
MAX_MU = 4096.0
HALVINGS = 50
ALMOST = 1 - 1e-6
UNATTAINED = (
    "the KL asked for could not be had at some choice: too few candidates, equal scores, or weights that move in jumps"
)


def either(data: object, name: str, default: float) -> object:
    """Fields of a rule with `name` at its default unless kl is given. Raises if both are."""
    if not isinstance(data, dict):
        return data
    if data.get(name) is not None and data.get("kl") is not None:
        raise PydanticCustomError("target", f"give {name} or kl, not both: kl is solved for {name}", {"param": "kl"})
    return data | {name: default} if data.get(name) is None and data.get("kl") is None else data


class Target(Selection):
    """A rule that samples by weights of a temperature beta, given or solved for."""

    beta: float | None = Field(
        default=None, gt=0, description="Temperature, in units of the combined reward; 0.1 unless kl is given."
    )
    kl: Nats | None = Field(default=None, description="KL of each choice from the policy, in nats, in place of beta.")

    @model_validator(mode="before")
    @classmethod
    def _one(cls, data: object) -> object:
        return either(data, "beta", 0.1)

    def draw(self, pool: Pool, weights: Callable[[float], Array]) -> Choice:
        """A candidate by weights(beta) at the rule's beta, or at the one of its kl."""
        if self.beta is not None:
            return drawn(pool, weights(self.beta))
        assert self.kl is not None
        beta = beta_for(pool.scores, weights, self.kl)
        w = weights(beta)
        obtained = selection_kl(w)
        detail = {"beta": beta, "kl_asked": self.kl, "kl_obtained": obtained}
        choice = drawn(pool, w, detail)
        if obtained < self.kl * ALMOST:
            return Choice(choice.index, choice.kl, choice.weights, detail=detail, warnings=(UNATTAINED,))
        return choice


def beta_for(scores: Array, weights: Callable[[float], Array], kl: float) -> float:
    """The smallest beta at which weights(beta) [C] are at most `kl` nats from equal ones, to rounding."""
    below = scores.max() - scores
    gaps = below[below > 0]
    if not gaps.size:
        return 1.0  # all are equal at every beta
    low = max(float(gaps.min()) * 1e-15, 5e-324)
    high = float(gaps.max())
    if selection_kl(weights(low)) <= kl:
        return low
    while math.isfinite(high) and selection_kl(weights(high)) > kl:
        low, high = high, high * 16
    probe = high / 16
    while probe > low and selection_kl(weights(probe)) <= kl:
        high, probe = probe, probe / 16
    low = max(low, probe)
    for _ in range(HALVINGS):
        middle = math.sqrt(low) * math.sqrt(high)
        if selection_kl(weights(middle)) > kl:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=256)
def mu_for(kl: float, n: int) -> float:
    """The mu, at most 4096, at which best-of-min(n, 1 + Poisson(mu)) is `kl` nats from the policy, or else less."""
    low, high = 1e-9, MAX_MU
    if best_of_poisson_kl(high, n) <= kl:
        return high
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        if best_of_poisson_kl(middle, n) > kl:
            high = middle
        else:
            low = middle
    return low
