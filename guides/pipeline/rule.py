"""What a selection rule is: from a pool of scored candidates to the choice of one.

A rule knows nothing of engines and rewards. It sees combined scores and, where it says that it needs them, texts,
log-probabilities, embeddings and a judge.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from guiderail.guides.pipeline.diagnostics import best_of_n_kl, selection_kl
from guiderail.guides.pipeline.steps import Array, checked


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The candidates to choose from.

    `scores` [C] are combined rewards, larger being better, `logprobs` the base policy's log-probability of each whole
    answer in nats, `lengths` in tokens. `embed` gives unit rows [C, D] for texts. `prefer(criterion, pairs)` asks a
    judge for the probability that answer a beats answer b, for pairs (a, b) of indices.
    """

    scores: Array
    texts: Sequence[str]
    logprobs: Sequence[float | None]
    lengths: Sequence[int]
    seed: int | None
    embed: Callable[[Sequence[str]], Awaitable[Array]]
    prefer: Callable[[str, Sequence[tuple[int, int]]], Awaitable[list[float]]]

    def __post_init__(self) -> None:
        checked(self.scores)
        if self.scores.ndim != 1 or not self.scores.size:
            raise ValueError("there must be at least one candidate to choose from")


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The index of the chosen candidate, and how it came about.

    `weights` [C] is the law from which a rule that samples drew it, `scores` [C] what a rule that changes scores
    compared; `kl` an estimate in nats of the KL of this choice from the base policy; `detail` a rule's own figures.
    """

    index: int
    kl: float
    weights: Array | None = None
    scores: Array | None = None
    detail: dict[str, float] = field(default_factory=dict)


class Selection(BaseModel, ABC):
    """A selection rule. The same seed and scores give the same choice."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: str
    needs_logprobs: ClassVar[bool] = False
    needs_embeddings: ClassVar[bool] = False
    needs_judge: ClassVar[bool] = False

    def draws(self, n: int, seed: int | None) -> int:
        """How many candidates best-of-n is to draw, at most n."""
        return n

    def check(self, n: int) -> None:
        """Raises ValueError, for people, if the rule cannot work with n candidates."""

    @abstractmethod
    async def pick(self, pool: Pool) -> Choice:
        """Chooses. Raises ValueError, for people, if the pool lacks what the rule needs."""


def first_best(scores: Array) -> int:
    """The first index of the largest score."""
    return int(scores.argmax())


def drawn(pool: Pool, weights: Array, detail: dict[str, float] | None = None) -> Choice:
    """A candidate sampled by `weights` [C], a law, with the pool's seed."""
    index = random.Random(pool.seed).choices(range(len(weights)), weights.tolist())[0]
    return Choice(index, selection_kl(weights), weights=weights, detail=detail or {})


def decided(pool: Pool, index: int, scores: Array | None = None, detail: dict[str, float] | None = None) -> Choice:
    """A candidate chosen without chance."""
    return Choice(index, best_of_n_kl(len(pool.scores)), scores=scores, detail=detail or {})
