"""Contexts over fakes, for tests that run a guide without a server."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fakes import LastDigit, LetterRenderer

from guiderail.guides.core.budget import Spend
from guiderail.guides.core.context import Context
from guiderail.guides.core.guide import Engine, Guide, Limits
from guiderail.guides.core.reward import Reward, Services
from guiderail.guides.core.types import Event, Final, Message, SamplingSpec, TokenPrompt
from guiderail.guides.scoring import RewardTerm
from guiderail.guides.scoring.calibration_sample import CalibrationSample, CalibrationSpec
from guiderail.guides.scoring.combine import Sum
from guiderail.guides.scoring.selection.best import Argmax
from guiderail.server.metrics import Metrics
from guiderail.server.scoring.batcher import BatchingScorer

DIGIT = RewardTerm("last_digit", "last_digit", 1.0, None)


class FakeHelpers:
    """Gives the calibration samples it was made with; embeddings by length; the judge prefers the longer answer."""

    def __init__(self, engine: Engine, samples: dict[str, Sequence[float]], renderer: Any = None) -> None:
        self.services = Services(engine, renderer or LetterRenderer(), frozenset({"adapter"}), "fake")
        self._samples = samples

    async def sample(self, ctx: Context, term: RewardTerm, length: int | None = None) -> CalibrationSample:
        return CalibrationSample(tuple(self._samples[term.label]), "drawn")

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
    **more: Any,
) -> Context:
    """A context over `engine`; by default one reward, LastDigit, its sum, and argmax."""
    scorer = BatchingScorer({"last_digit": reward or LastDigit()}, Metrics("fake"))
    values: dict[str, Any] = {
        "engine": engine, "scorer": scorer, "helpers": FakeHelpers(engine, samples or {}, renderer),
        "messages": (Message("user", "q"),), "prompt": TokenPrompt((1, 2)),
        "sampling": SamplingSpec(max_tokens=50, seed=10), "rewards": rewards, "combine": Sum(name="sum"),
        "selection": Argmax(), "calibration": CalibrationSpec(), "limits": Limits(), "spend": Spend(),
    }  # fmt: skip
    return Context(**(values | more))


async def run(guide: Guide, ctx: Context) -> list[Event]:
    """All events of a guide's run."""
    async with ctx:
        return [event async for event in guide.run(ctx)]


def final(events: Sequence[Event]) -> Final:
    """The one Final, which must come last."""
    assert isinstance(events[-1], Final)
    assert sum(isinstance(e, Final) for e in events) == 1
    return events[-1]
