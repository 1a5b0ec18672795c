"""Calibration: samples of a reward's values of the base policy's answers, and the transforms that are fitted on them.

The answers are apart from the candidates: a quantile estimated from the candidates themselves would be
nothing but their rank (InfAlign-CTRL, arXiv 2412.19792). Where the samples come from is the server's business.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from pydantic import Field

from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.interfaces import Renderer, Scorer
from guiderail.guides.core.metering import MeteredEngine
from guiderail.guides.core.tasks import Background, together
from guiderail.guides.core.types import Answer, Fields
from guiderail.guides.scoring.chain import RewardTerm
from guiderail.guides.scoring.transforms import Fitted

Transforms = dict[str, Fitted]


class CalibrationSpec(Fields):
    """A request's `calibration`: which samples transforms that need some are fitted on."""

    source: Literal["auto", "drawn", "stored", "pooled"] = Field(
        "auto",
        description="drawn: on the fly; stored: the operator's for this prompt; auto: stored where there are such, "
        "else drawn; pooled: stored, or for a prompt that is not among the stored ones those of all of them together.",
    )
    n: int = Field(32, ge=2, le=1024, description="Answers drawn for a prompt that has no pool yet.")


@dataclass(frozen=True, slots=True)
class CalibrationSample:
    """Raw values [M] of one reward under the base policy.

    source: "drawn" for this prompt by this request, "shared" if another request drew them, "stored" for this
    prompt by the operator, or "stored_pooled": the operator's, pooled over other prompts. warnings: what the client
    should know of how the values came about.
    """

    values: tuple[float, ...]
    source: str
    warnings: tuple[str, ...] = ()


class Calibrator(Protocol):
    """Finds what calibrates a reward, or draws it."""

    async def sample(
        self,
        dialogue: Dialogue,
        engine: MeteredEngine,
        scorer: Scorer,
        term: RewardTerm,
        spec: CalibrationSpec,
        length: int | None = None,
    ) -> CalibrationSample:
        """Raw values of the reward, of answers that the dialogue's policy gives. Raises RewardFailed, DeadlinePassed.

        length: of these answers cut after so many tokens, which partial answers of that length compare with.
        """
        ...


class Fits:
    """The fitted transforms of rewards: once for whole answers, once for each length of partial ones.

    by_length: True if partial answers have transforms of their own.
    """

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        sample: Callable[[RewardTerm, int | None], Awaitable[CalibrationSample]],
        values: Callable[[RewardTerm, tuple[Answer, ...]], Awaitable[tuple[float, ...]]],
        renderer: Renderer,
        background: Background,
    ) -> None:
        """sample: gives what calibrates a reward, of answers cut after so many tokens (None: of whole ones).

        values: scores answers with a reward. renderer: gives the tokens of reference answers.
        """
        self._terms = terms
        self._sample = sample
        self._values = values
        self._renderer = renderer
        self._background = background
        self._tasks: dict[int | None, asyncio.Task[Transforms]] = {}
        self.by_length = any(term.chain.needs_sample for term in terms)
        self._has_work = self.by_length or any(term.chain.reference_answers for term in terms)

    def begin(self) -> None:
        """Start to draw what the transforms are fitted on, beside the guide's own work."""
        if self._has_work:
            self._task(None)

    async def transforms(self, length: int | None) -> Transforms:
        """The fitted transforms by label. Concurrent callers share one fit, which none of them can cancel.

        length: of the partial answers that they are for, in tokens; None for whole ones.
        """
        task = self._task(length)
        return task.result() if task.done() else await asyncio.shield(task)

    def _task(self, length: int | None) -> "asyncio.Task[Transforms]":
        if length not in self._tasks:
            self._tasks[length] = self._background.start(self._fit(length))
        return self._tasks[length]

    async def _fit(self, length: int | None) -> Transforms:
        whole = {} if length is None else await self.transforms(None)
        terms = [term for term in self._terms if length is None or term.chain.needs_sample]
        fitted = await together(self._fit_term(term, length) for term in terms)
        return {**whole, **dict(zip((term.label for term in terms), fitted, strict=True))}

    async def _fit_term(self, term: RewardTerm, length: int | None) -> Fitted:
        chain, sample = term.chain, None
        if chain.needs_sample:
            sample = np.array((await self._sample(term, length)).values)
        references: dict[str, float] = {}
        if chain.reference_answers:
            answers = tuple(
                Answer(text, tuple(self._renderer.encode(text, plain=True))) for text in chain.reference_answers
            )
            references = dict(zip(chain.reference_answers, await self._values(term, answers), strict=True))
        return chain.fit(sample, references)
