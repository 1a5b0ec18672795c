"""Contexts over fakes, for tests that run a guide without a server."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fakes import LastDigit, LetterRenderer

from guiderail.guides.core.context import Context
from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.interfaces import Engine
from guiderail.guides.core.metering import Limits, Spend
from guiderail.guides.core.reward import Reward
from guiderail.guides.core.types import Event, Final, Message, SamplingSpec, TokenPrompt
from guiderail.guides.scoring import RewardTerm
from guiderail.guides.scoring.calibration import CalibrationSample, CalibrationSpec
from guiderail.guides.scoring.combine import Sum
from guiderail.guides.scoring.pipeline import Judging, Scorers
from guiderail.guides.scoring.selection.best import Argmax
from guiderail.server.metrics import Metrics
from guiderail.server.scoring.batcher import BatchingScorer

DIGIT = RewardTerm("last_digit", "last_digit", 1.0, None)


class FakeSamples:
    """Gives the calibration samples it was made with, by the reward's label."""

    def __init__(self, samples: dict[str, Sequence[float]]) -> None:
        self._samples = samples

    async def sample(
        self, dialogue: Any, engine: Any, scorer: Any, term: RewardTerm, spec: Any, length: int | None = None
    ) -> CalibrationSample:
        return CalibrationSample(tuple(self._samples[term.label]), "drawn")


class FakeComparisons:
    """Embeddings by length; a judge that prefers the longer answer."""

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        angles = np.array([len(text) / 100 for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    async def prefer(
        self, messages: Sequence[Message], criterion: str, answers: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> list[float]:
        return [0.5 + 0.4 * np.sign(len(answers[a]) - len(answers[b])) for a, b in pairs]


def context(
    engine: Engine,
    *,
    rewards: tuple[RewardTerm, ...] = (DIGIT,),
    reward: Reward | None = None,
    samples: dict[str, Sequence[float]] | None = None,
    renderer: Any = None,
    scorer: Any = None,
    comparisons: Any = None,
    calibrator: Any = None,
    combine: Any = None,
    selection: Any = None,
    calibration: CalibrationSpec | None = None,
    limits: Limits | None = None,
    spend: Spend | None = None,
    choice: int = 0,
    told: Sequence[str] = (),
    **more: Any,
) -> Context:
    """A context over `engine`; by default one reward, LastDigit, its sum, and argmax. `more` is of the Dialogue."""
    scorer = scorer or BatchingScorer({"last_digit": reward or LastDigit()}, Metrics("fake"))
    compared = comparisons or FakeComparisons()
    values: dict[str, Any] = {
        "messages": (Message("user", "q"),), "prompt": TokenPrompt((1, 2)),
        "sampling": SamplingSpec(max_tokens=50, seed=10),
    }  # fmt: skip
    return Context.of(
        Dialogue(renderer=renderer or LetterRenderer(), model_name="fake", told=tuple(told), **(values | more)),
        Judging(rewards, combine or Sum(), selection or Argmax(), calibration or CalibrationSpec()),
        engine,
        Scorers(scorer, calibrator or FakeSamples(samples or {}), compared, compared),
        limits=limits or Limits(),
        spend=spend or Spend(),
        request="test",
        answer=choice,
    )


async def run(guide: Guide, ctx: Context) -> list[Event]:
    """All events of a guide's run."""
    async with ctx:
        return [event async for event in guide.run(ctx)]


def final(events: Sequence[Event]) -> Final:
    """The one Final, which must come last."""
    assert isinstance(events[-1], Final)
    assert sum(isinstance(e, Final) for e in events) == 1
    return events[-1]
