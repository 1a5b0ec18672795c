"""Rewards by table, and Contexts over a tabular engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from contexts import context
from tabular_engine import PROMPT, TabularEngine

from guiderail.guides.core.context import Context
from guiderail.guides.core.interfaces import Scorer, ScoreResult
from guiderail.guides.core.types import ScoreGroup, TokenPrompt
from guiderail.guides.scoring import IDENTITY, Chain, RewardTerm


@dataclass
class Scores:
    """A Scorer: a reward is a table of whole answers' values; partial ones have the value of `partial`.

    Counts what it is asked. fault: raised instead of scoring.
    """

    rewards: Mapping[str, Any]
    partial: Any = lambda ids: 0.0
    calls: int = 0
    answers: int = 0
    fault: Exception | None = None

    async def score(self, reward: str, group: ScoreGroup, owner: int = 0) -> ScoreResult:
        if self.fault is not None:
            raise self.fault
        self.calls += 1
        self.answers += len(group.answers)
        table = self.rewards[reward]
        values = [self.partial(a.token_ids) if a.partial else table[a.token_ids] for a in group.answers]
        return ScoreResult(tuple(float(value) for value in values), tokens=len(values))


def tabular_context(
    engine: TabularEngine,
    scores: Scorer,
    *,
    weights: Mapping[str, float] | None = None,
    chain: Chain = IDENTITY,
    **more: Any,
) -> Context:
    """A Context over a tabular engine; `weights` are the rewards' by name, "r" alone with 1 by default."""
    terms = tuple(RewardTerm(name, name, weight, None, chain) for name, weight in (weights or {"r": 1.0}).items())
    values: dict[str, Any] = {"prompt": TokenPrompt(PROMPT), "renderer": engine.renderer}
    return context(engine, rewards=terms, scorer=scores, **(values | more))
