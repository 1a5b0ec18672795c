"""The Context: all that a guide sees of the server, for one answer.

It draws rollouts from the policy with `generate`, scores answers with `score`, and chooses with `select`.
The Context counts what that costs and enforces deadline and token budget, so every guide is costed and
bounded alike; and it holds the pipeline raw rewards -> transform -> combine -> select.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from guiderail.guides.base import Engine, Helpers, Limits, Rollouts, Scorer
from guiderail.guides.calibration import CalibrationSpec
from guiderail.guides.errors import RequestError, RewardFailed
from guiderail.guides.pipeline import Combine, Pool, RewardTerm, Selection
from guiderail.guides.prompters.base import Cleaner
from guiderail.guides.report import SelectionReport
from guiderail.guides.spend import Spend
from guiderail.guides.tasks import together
from guiderail.guides.types import Answer, Candidate, Delta, Message, SamplingSpec, ScoreGroup, TokenPrompt

Transforms = dict[str, Callable[[Any], Any]]
DRAWS_APART = 1_000_003  # seeds of a guide's successive draws are this far apart, more than any draw has rows


@dataclass(slots=True)
class Context:
    """Everything a guide may use for one answer. `choice` numbers the answers of one request (its `n`)."""

    engine: Engine
    scorer: Scorer
    helpers: Helpers
    messages: tuple[Message, ...]
    prompt: TokenPrompt
    sampling: SamplingSpec
    rewards: tuple[RewardTerm, ...]
    combine: Combine
    selection: Selection
    calibration: CalibrationSpec
    limits: Limits
    spend: Spend
    choice: int = 0
    cleaner: Callable[[], Cleaner] = Cleaner
    report: SelectionReport = field(default_factory=SelectionReport)
    _fitting: "asyncio.Task[Transforms] | None" = None
    _picks: int = 0

    def clean(self, text: str) -> str:
        """The answer in a text that the policy wrote, without what belongs to its prompt's layout."""
        return self.cleaner().clean(text)

    def seeds(self, n: int, apart: int = 0) -> list[int | None]:
        """Seeds of this choice's n rollouts: the request's seed, counted on through all its choices.

        `apart` numbers the draws of a guide that draws more than once; equal numbers give equal seeds.
        """
        seed = self.sampling.seed
        first = None if seed is None else seed + self.choice * n + apart * DRAWS_APART
        return [None if first is None else _int64(first + i) for i in range(n)]

    def over(self, tokens: int = 0) -> str | None:
        """The limit that leaves no room for `tokens` more: "deadline", "budget" or None."""
        deadline, budget = self.limits.deadline, self.limits.max_tokens_generated
        if deadline is not None and time.monotonic() >= deadline:
            return "deadline"
        return "budget" if budget is not None and self.spend.tokens_generated + tokens > budget else None

    async def next_tokens(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[list[tuple[int, float]]]:
        """After each prompt the `top_k` likeliest tokens, likeliest first, and their log-probabilities (temperature 1).

        Costs one generated token for each prompt.
        """
        self.spend.tokens_generated += len(prompts)
        self.spend.rollouts += len(prompts)
        with self.spend.generation.span(), self.spend.working.span():
            found = await self.engine.next_token_logprobs(prompts, top_k)
        return [sorted(each.items(), key=lambda item: (-item[1], item[0]))[:top_k] for each in found]

    def generate(self, prompts: Sequence[TokenPrompt], sampling: SamplingSpec, seeds: Sequence[int | None]) -> Rollouts:
        """Engine.generate, counted in `spend` and cut off at the request's limits."""
        if self.limits.max_tokens_generated is not None:  # shared with what else the request has in the engine
            sampling = replace(sampling, stream=True)  # tokens have to be seen to be counted in time
        if self.selection.needs_logprobs and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)
        rollouts = self.engine.generate(prompts, sampling, seeds=seeds, deadline=self.limits.deadline)
        return _Counted(rollouts, [len(prompt.mix) for prompt in prompts], self)

    async def __aenter__(self) -> Self:
        """Begins to draw what the transforms are fitted on, beside the guide's own work."""
        if any(term.chain.needs_sample or term.chain.reference_answers for term in self.rewards):
            self._fitting = asyncio.create_task(self._fit())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fitting is not None:
            self._fitting.cancel()
            await asyncio.gather(self._fitting, return_exceptions=True)

    async def score(self, candidates: Sequence[Candidate]) -> None:
        """Fills `rewards` (raw) and `transformed` of the candidates, for all rewards of the request.

        Raises RewardFailed if a reward fails or returns a value that is not finite.
        """
        if not candidates or not self.rewards:
            return
        answers = tuple(Answer(self.clean(c.text), c.token_ids, partial=not c.finished) for c in candidates)
        with self.spend.scoring.span(), self.spend.working.span():
            results = await together(self._raw(term, answers) for term in self.rewards)
            transforms = await self._transforms()
        for term, values in zip(self.rewards, results, strict=True):
            changed = transforms[term.label](np.asarray(values, dtype=np.float64))
            for candidate, raw, value in zip(candidates, values, changed, strict=True):
                candidate.rewards[term.label] = raw
                candidate.transformed[term.label] = float(value)

    def rate(self, candidates: Sequence[Candidate]) -> list[float]:
        """Combines the transformed rewards of a group of scored candidates; fills their `combined`."""
        terms = [term for term in self.rewards if term.weight]  # weight 0: reported only
        if not terms or not candidates:
            return []
        labels = [term.label for term in terms]
        for candidate in candidates:
            if not candidate.transformed:
                raise RewardFailed("(selection)", f"candidate {candidate.index} was never scored")
        values = np.array([[candidate.transformed[label] for label in labels] for candidate in candidates])
        combined = self.combine.combine(values, np.array([term.weight for term in terms]), labels)
        for candidate, value in zip(candidates, combined, strict=True):
            candidate.combined = float(value)
        return [float(value) for value in combined]

    async def select(self, candidates: Sequence[Candidate]) -> Candidate:
        """Rates scored candidates and returns the one that the request's selection rule picks."""
        self.rate(candidates)
        return await self.pick(candidates)

    async def pick(self, candidates: Sequence[Candidate], log_prior: Sequence[float] | None = None) -> Candidate:
        """The selection rule's choice among candidates whose `combined` is set. Raises RequestError if it cannot.

        log_prior: the candidates' log-probabilities under the policy, where they were enumerated and not sampled.
        """
        scores = []
        for candidate in candidates:
            if candidate.combined is None:
                raise RewardFailed("(selection)", f"candidate {candidate.index} was never rated")
            scores.append(candidate.combined)
        seed = self.seeds(1, self._picks)[0]
        self._picks += 1
        texts = [self.clean(candidate.text) for candidate in candidates]
        pool = Pool(
            scores=np.array(scores),
            texts=texts,
            logprobs=[None if c.logprobs is None else sum(t.logprob for t in c.logprobs) for c in candidates],
            lengths=[len(candidate.token_ids) for candidate in candidates],
            seed=seed,
            embed=self.helpers.embed,
            prefer=lambda criterion, pairs: self.helpers.prefer(self.messages, criterion, texts, pairs),
        )
        try:
            choice = await self.selection.pick(pool)
        except ValueError as error:
            raise RequestError(f"'alignment.select': {error}", "alignment.select") from error
        for i, candidate in enumerate(candidates):
            candidate.weight = None if choice.weights is None else float(choice.weights[i])
            candidate.adjusted = None if choice.scores is None else float(choice.scores[i])
        if log_prior is not None:
            law = choice.weights if choice.weights is not None else np.eye(len(scores))[choice.index]
            choice = replace(
                choice, kl=float(sum(w * (np.log(w) - p) for w, p in zip(law, log_prior, strict=True) if w))
            )
        self.report.picked(candidates, choice, {term.label: term.weight for term in self.rewards})
        return candidates[choice.index]

    async def _raw(self, term: RewardTerm, answers: tuple[Answer, ...]) -> tuple[float, ...]:
        group = ScoreGroup(self.messages, self.prompt, answers, term.params)
        result = await self.scorer.score(term.name, group, id(self.spend))
        self.spend.reward_calls += 1
        self.spend.reward_tokens += result.tokens
        return result.values

    async def _transforms(self) -> Transforms:
        """The fitted transforms by label. Concurrent callers share one fit, which none of them can cancel."""
        if self._fitting is None:
            self._fitting = asyncio.create_task(self._fit())
        return await asyncio.shield(self._fitting)

    async def _fit(self) -> Transforms:
        return dict(
            zip((t.label for t in self.rewards), await together(map(self._fit_term, self.rewards)), strict=True)
        )

    async def _fit_term(self, term: RewardTerm) -> Callable[[Any], Any]:
        chain, sample = term.chain, None
        if chain.needs_sample:
            drawn = await self.helpers.sample(self, term)
            sample = np.array(drawn.values)
            self.report.calibrated(term.label, drawn)
        references: dict[str, float] = {}
        if chain.reference_answers:
            answers = tuple(
                Answer(text, tuple(self.helpers.services.renderer.encode(text))) for text in chain.reference_answers
            )
            references = dict(zip(chain.reference_answers, await self._raw(term, answers), strict=True))
        return chain.fit(sample, references)


def _int64(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


class _Counted:
    """Rollouts that add to their Context's spend and stop at its token budget."""

    def __init__(self, rollouts: Rollouts, mixed: Sequence[int], ctx: Context) -> None:
        """mixed: for each row how many policies are mixed into it."""
        self._rollouts = rollouts
        self._rows = len(mixed)
        self._mixed = mixed
        self._ctx = ctx
        self._clock = ExitStack()

    async def __aenter__(self) -> Self:
        self._ctx.spend.rollouts += self._rows
        await self._rollouts.__aenter__()
        self._clock.enter_context(self._ctx.spend.generation.span())
        self._clock.enter_context(self._ctx.spend.working.span())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.close()
        await self._rollouts.__aexit__(kind, error, trace)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        spend, budget = self._ctx.spend, self._ctx.limits.max_tokens_generated
        stopped = False
        async for delta in self._rollouts:
            spend.tokens_generated += len(delta.token_ids)
            spend.mixed_tokens += len(delta.token_ids) * self._mixed[delta.row]
            if budget is not None and not stopped and spend.tokens_generated >= budget:
                stopped = True
                for row in range(self._rows):
                    await self._rollouts.drop(row, "budget")
            yield delta

    async def drop(self, row: int, reason: str = "dropped") -> None:
        await self._rollouts.drop(row, reason)
