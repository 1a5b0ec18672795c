"""Every course that a guide can take on a tabular policy, with its probability: exact distributions of its answers.

What is left to chance, the engine's tokens and the draws of a selection rule, asks a `Chance`. The first run takes the
first possible outcome everywhere; each next one changes the last choice that has outcomes left, until none has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tabular import EOS
from tabular_engine import TabularEngine

from guiderail.guides.core.types import SamplingSpec, TokenPrompt


@dataclass
class Chance:
    """The choices of one run: `path` has the outcome of each, `probability` is theirs together."""

    path: list[int] = field(default_factory=list)
    _left: list[list[int]] = field(default_factory=list)
    _at: int = 0
    probability: float = 1.0

    def choose(self, p: Sequence[float]) -> int:
        """An outcome of this distribution."""
        total = float(sum(p))
        if self._at == len(self.path):
            possible = [i for i, each in enumerate(p) if each > 0]
            self.path.append(possible[0])
            self._left.append(possible[1:])
        outcome = self.path[self._at]
        self._at += 1
        self.probability *= float(p[outcome]) / total
        return outcome

    def runs(self) -> Iterator[float]:
        """One item a run; its probability is in `probability` once it has ended."""
        while True:
            self._at, self.probability = 0, 1.0
            yield 0.0
            while self._left and not self._left[-1]:
                self._left.pop()
                self.path.pop()
            if not self._left:
                return
            self.path[-1] = self._left[-1].pop(0)


class ExhaustiveEngine(TabularEngine):
    """A tabular engine whose tokens ask `chance`."""

    chance: Chance

    def _draw(self, prompt: TokenPrompt, sampling: SamplingSpec, at: int, rng: Any) -> int:
        p = self.distribution(prompt).copy()
        if at < sampling.min_tokens:
            p[EOS] = 0
        if sampling.temperature == 0:
            return int(p.argmax())
        return self.chance.choose(np.asarray(p ** (1 / sampling.temperature)).tolist())


class ChanceModule:
    """Stands in for the module `random` where selection rules read it."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance

    def Random(self, seed: Any) -> "ChanceModule":
        return self

    def choices(self, outcomes: Sequence[int], weights: Sequence[float]) -> list[int]:
        return [outcomes[self._chance.choose(weights)]]
