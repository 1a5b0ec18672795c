"""Selection rules: from a pool of scored candidates to the choice of one; and the plainest of them, argmax.

A rule knows nothing of engines and rewards. It sees combined scores and, where it says that it needs them, texts,
log-probabilities, embeddings and a judge.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from guiderail.guides.core.types import Fields
from guiderail.guides.scoring.kl import POOL_KINDS, Origin, PoolKind
from guiderail.guides.scoring.transforms import Array, checked


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The candidates to choose from.

    `scores` [C] are combined rewards, larger being better, `logprobs` the base policy's log-probability of each whole
    answer in nats, `lengths` in tokens. `embed` gives unit rows [C, D] for texts. `prefer(criterion, pairs)` asks a
    judge for the probability that answer a beats answer b, for pairs (a, b) of indices. `ties` [C] orders candidates
    of equal score, larger being better: what a transform made equal need not be. `origin` says how the candidates
    were made, by default as independent answers; None: unknown, and then no KL is known either.
    """

    scores: Array
    texts: Sequence[str]
    logprobs: Sequence[float | None]
    lengths: Sequence[int]
    seed: int | None
    embed: Callable[[Sequence[str]], Awaitable[Array]]
    prefer: Callable[[str, Sequence[tuple[int, int]]], Awaitable[list[float]]]
    ties: Array | None = None
    origin: Origin | None = field(default_factory=lambda: Origin("answers"))

    def __post_init__(self) -> None:
        checked(self.scores)
        if self.scores.ndim != 1 or not self.scores.size:
            raise ValueError("there must be at least one candidate to choose from")

    def best(self, scores: Array | None = None) -> int:
        """The index of the largest of `scores` [C] (default: the pool's); of equals the best by `ties`, then first."""
        ties = np.zeros(len(self.scores)) if self.ties is None else self.ties
        return int(np.lexsort((np.arange(len(ties)), -ties, -(self.scores if scores is None else scores)))[0])

    def kl(self, weights: Array) -> float | None:
        """Bound of the KL of a draw by `weights` [C] (see kl.py), in nats; None where there is none."""
        return None if self.origin is None else self.origin.kl(weights)

    def kl_of(self, index: int) -> float | None:
        """The same of a choice without chance."""
        return None if self.origin is None else self.origin.kl_of(index, len(self.scores))


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The index of the chosen candidate, and how it came about.

    `weights` [C] is the distribution from which a rule that samples drew it, `scores` [C] what a rule that changes
    scores compared; `kl` bounds in nats the KL of this choice from the policy (kl.py says how), or is None;
    `detail` a rule's own metrics, `warnings` what it could not do as asked.
    """

    index: int
    kl: float | None
    weights: Array | None = None
    scores: Array | None = None
    detail: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Selection(Fields, ABC):
    """A selection rule. The same seed and scores give the same choice."""

    name: str
    needs_logprobs: ClassVar[bool] = False
    valid_for: ClassVar[frozenset[PoolKind]] = frozenset()  # pools on which it does what it says; others are refused

    def draws(self, n: int, seed: int | None) -> int:
        """Number of candidates that best-of-n is to draw, at most n."""
        return n

    def at(self, temperature: float) -> "Selection":
        """The rule for tokens of this temperature: p ^ (1 / temperature) of a rule that samples tokens with p."""
        return self

    def check(self, n: int) -> None:
        """Raises ValueError, for people, if the rule cannot work with n candidates."""

    @abstractmethod
    async def pick(self, pool: Pool) -> Choice:
        """Chooses. Raises ValueError, for people, if the pool lacks what the rule needs."""


def drawn(pool: Pool, weights: Array, detail: dict[str, float] | None = None) -> Choice:
    """A candidate sampled by `weights` [C], which sum to 1, with the pool's seed."""
    index = random.Random(pool.seed).choices(range(len(weights)), weights.tolist())[0]
    return Choice(index, pool.kl(weights), weights=weights, detail=detail or {})


def decided(pool: Pool, index: int, scores: Array | None = None, detail: dict[str, float] | None = None) -> Choice:
    """A candidate chosen without chance."""
    return Choice(index, pool.kl_of(index), scores=scores, detail=detail or {})


class Argmax(Selection):
    """The largest combined reward; of equals the largest raw one, then the first. On n draws this is best-of-N.

    Density n u^(n - 1) in the quantile u of a continuous reward: win rate n / (n + 1) against the base policy at a KL
    of log n - (n - 1) / n (arXiv 2401.01879). As n grows it tends to the reward's maximum, errors of the reward
    included. Costs n L tokens and n scores.
    """

    name: Literal["argmax"] = "argmax"
    valid_for: ClassVar[frozenset[PoolKind]] = frozenset(POOL_KINDS)

    async def pick(self, pool: Pool) -> Choice:
        return decided(pool, pool.best())
