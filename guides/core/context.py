"""The Context: all that a guide sees of the server, for one answer.

It draws rollouts from the policy with `generate`, scores answers with `score`, and chooses with `select`.
The Context counts what that costs and enforces deadline and token budget, so every guide is costed and
bounded alike; and it holds the pipeline raw rewards -> transform -> combine -> select.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from guiderail.guides.core import seeds
from guiderail.guides.core.budget import Spend
from guiderail.guides.core.decoder import Decoder
from guiderail.guides.core.errors import RequestError, RewardFailed
from guiderail.guides.core.guide import Engine, Helpers, Limits, Rollouts, Scorer
from guiderail.guides.core.metered_engine import Counted
from guiderail.guides.core.reward import begun
from guiderail.guides.core.tasks import together
from guiderail.guides.core.types import Answer, Candidate, Message, SamplingSpec, ScoreGroup, TokenPrompt
from guiderail.guides.prompters import Cleaner, Prompter, Template, with_system
from guiderail.guides.scoring import Combine, Origin, Pool, RewardTerm, Selection
from guiderail.guides.scoring.calibration_sample import CalibrationSpec
from guiderail.guides.scoring.selection_report import SelectionReport
from guiderail.guides.scoring.transforms import checked

Transforms = dict[str, Callable[[Any], Any]]
ALL_ALIKE = (
    "greedy decoding (temperature 0 or top_k 1) makes all draws after one prompt the same: they cost their tokens, and "
    "leave nothing to select from"
)


@dataclass(slots=True)
class Context:
    """Everything a guide may use for one answer. `choice` numbers the answers of one request.

    messages: the conversation as the request has it. prompter: what made `prompt` of it. told: what policies of this
    answer are told besides, in the order of telling. continues: whether the answer goes on with the last message.
    """

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
    prompter: Prompter = field(default_factory=Template)
    continues: bool | None = None
    told: list[str] = field(default_factory=list)
    report: SelectionReport = field(default_factory=SelectionReport)
    _fits: "dict[int | None, asyncio.Task[Transforms]]" = field(default_factory=dict)  # copies of a Context share them
    _picks: int = 0

    def clean(self, text: str) -> str:
        """The answer in a text that the policy wrote, without what belongs to its prompt's layout."""
        return self.cleaner().clean(text)

    @property
    def begun(self) -> str:
        """The beginning of the answer that the conversation ends with, or ""."""
        return begun(self.messages)

    @property
    def view(self) -> tuple[Message, ...]:
        """The conversation as rewards read it: with all that the policies which write this answer were told.

        One view holds for everything that is scored, rollouts of a baseline and calibration answers too: a reward's
        values can only be compared where they are of the same conversation.
        """
        return with_system(self.messages, *self.told, self.prompter.says)

    def tell(self, *texts: str) -> None:
        """Notes what a policy of this answer is told besides the conversation. Do it before anything is scored."""
        self.told += [text for text in dict.fromkeys(texts) if text and text not in self.told]

    def render(self, prompter: Prompter, messages: Sequence[Message]) -> TokenPrompt:
        """A conversation that ends as the request's does, as a prompter's prompt. Raises RequestError."""
        goes_on = bool(self.messages) and self.messages[-1].role == "assistant"
        goes_on = goes_on if self.continues is None else self.continues
        renderer = self.helpers.services.renderer
        return prompter.render(messages, renderer, add_generation_prompt=not goes_on, continue_final_message=goes_on)

    def decoder(self) -> Decoder:
        """What gives the text of an answer's tokens."""
        skip = self.sampling.skip_special_tokens
        return Decoder(self.helpers.services.renderer, self.prompt, skip_special_tokens=skip)

    def answer(self, text: str, token_ids: tuple[int, ...], *, partial: bool = False) -> Answer:
        """What rewards read of what the policy wrote: the text without its layout, and the tokens that are left."""
        clean = self.clean(text)
        if clean != text:
            token_ids = token_ids[: self.decoder().kept(token_ids, text.find(clean) + len(clean))]
        return Answer(clean, token_ids, partial)

    def group(self, answers: tuple[Answer, ...], term: RewardTerm) -> ScoreGroup:
        """Answers of this Context's policy for a reward."""
        return ScoreGroup(self.view, self.prompt, answers, term.params, partial(self.render, self.prompter))

    def seeds(self, n: int, step: int = 0, stream: str = seeds.DRAW) -> Sequence[int | None]:
        """Seeds of n sequences of this answer (seeds.py). No two steps and no two streams have one in common.

        A guide that draws more than once numbers its draws by `step`; equal numbers give equal seeds.
        """
        return seeds.Seeds(self.sampling.seed, self.choice).stream(n, stream, step)

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
        self._begin()
        self.spend.tokens_generated += len(prompts)
        self.spend.rollouts += len(prompts)
        with self.spend.generation.span(), self.spend.working.span():
            found = await self.engine.next_token_logprobs(prompts, top_k)
        return [sorted(each.items(), key=lambda item: (-item[1], item[0]))[:top_k] for each in found]

    def generate(self, prompts: Sequence[TokenPrompt], sampling: SamplingSpec, seeds: Sequence[int | None]) -> Rollouts:
        """Engine.generate, counted in `spend` and cut off at the request's limits."""
        self._begin()
        if self.limits.max_tokens_generated is not None:  # shared with what else the request has in the engine
            sampling = replace(sampling, stream=True)  # tokens have to be seen to be counted in time
        if (sampling.temperature == 0 or sampling.top_k == 1) and len(set(prompts)) < len(prompts):
            self.report.warn(ALL_ALIKE)
        if self.selection.needs_logprobs and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)
        rollouts = self.engine.generate(prompts, sampling, seeds=seeds, deadline=self.limits.deadline)
        return Counted(rollouts, [len(prompt.mix) for prompt in prompts], self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._fits.values():
            task.cancel()
        await asyncio.gather(*self._fits.values(), return_exceptions=True)

    async def score(self, candidates: Sequence[Candidate]) -> None:
        """Fills `rewards` (raw) and `transformed` of the candidates, for all rewards of the request.

        Whole answers are calibrated on whole ones, a partial answer on the policy's answers cut at its own length:
        among whole answers each beginning would be the shortest, and a reward that grows with length lowest of all.

        Raises RewardFailed if a reward fails or returns a value that is not finite.
        """
        if not candidates or not self.rewards:
            return
        answers = tuple(self.answer(c.text, c.token_ids, partial=not c.finished) for c in candidates)
        with self.spend.scoring.span(), self.spend.working.span():
            results = await together(self._raw(term, answers) for term in self.rewards)
            lengths = [self._calibrated_at(candidate) for candidate in candidates]
            distinct = list(dict.fromkeys(lengths))
            fits = dict(zip(distinct, await together(map(self._transforms, distinct)), strict=True))
        for term, values in zip(self.rewards, results, strict=True):
            for length, fitted in fits.items():
                group = [i for i, each in enumerate(lengths) if each == length]
                changed = fitted[term.label](np.array([values[i] for i in group], dtype=np.float64))
                for i, value in zip(group, changed, strict=True):
                    candidates[i].rewards[term.label] = values[i]
                    candidates[i].transformed[term.label] = float(value)

    def rate(self, candidates: Sequence[Candidate]) -> list[float]:
        """Combines the transformed rewards of a group of scored candidates; fills their `combined`."""
        terms = [term for term in self.rewards if term.weight]  # weight 0: reported only
        if not terms or not candidates:
            return []
        labels = [term.label for term in terms]
        for candidate in candidates:
            if not candidate.transformed:
                raise RewardFailed("(selection)", f"candidate {candidate.index} was never scored")
        weights = np.array([term.weight for term in terms])
        values = np.array([[candidate.transformed[label] for label in labels] for candidate in candidates])
        raw = np.array([[candidate.rewards[label] for label in labels] for candidate in candidates])
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # checked, and named
                combined = checked(self.combine.combine(values, weights, labels))
        except ValueError as error:
            raise RequestError(f"'alignment.combine': {error}", "alignment.combine") from error
        ties = self.combine.ties(raw, weights, labels)
        for candidate, value, tie in zip(candidates, combined, ties, strict=True):
            candidate.combined, candidate.tie = float(value), float(tie)
        return [float(value) for value in combined]

    async def select(self, candidates: Sequence[Candidate], origin: Origin | None = None) -> Candidate:
        """Rates scored candidates and returns the one that the request's selection rule picks; see `pick`."""
        self.rate(candidates)
        return await self.pick(candidates, origin)

    async def pick(self, candidates: Sequence[Candidate], origin: Origin | None = None) -> Candidate:
        """The selection rule's choice among candidates whose `combined` is set. Raises RequestError if it cannot.

        origin: how the candidates were made; None: the answer's KL from the policy is reported as unknown.
        """
        scores = []
        for candidate in candidates:
            if candidate.combined is None:
                raise RewardFailed("(selection)", f"candidate {candidate.index} was never rated")
            scores.append(candidate.combined)
        (seed,) = self.seeds(1, self._picks, seeds.PICK)
        self._picks += 1
        texts = [self.begun + self.clean(candidate.text) for candidate in candidates]
        tokens = origin is not None and origin.kind == "tokens"
        rule = self.selection.at(self.sampling.temperature) if tokens else self.selection
        try:
            pool = Pool(
                scores=np.array(scores),
                texts=texts,
                logprobs=[None if c.logprobs is None else sum(t.logprob for t in c.logprobs) for c in candidates],
                lengths=[len(candidate.token_ids) for candidate in candidates],
                seed=seed,
                embed=self.helpers.embed,
                prefer=lambda criterion, pairs: self.helpers.prefer(self.view, criterion, texts, pairs),
                ties=np.array([candidate.tie for candidate in candidates]),
                origin=origin,
            )
            choice = await rule.pick(pool)
        except ValueError as error:
            raise RequestError(f"'alignment.select': {error}", "alignment.select") from error
        for i, candidate in enumerate(candidates):
            candidate.weight = None if choice.weights is None else float(choice.weights[i])
            candidate.adjusted = None if choice.scores is None else float(choice.scores[i])
        self.report.picked(candidates, choice, {term.label: term.weight for term in self.rewards})
        return candidates[choice.index]

    async def _raw(self, term: RewardTerm, answers: tuple[Answer, ...]) -> tuple[float, ...]:
        result = await self.scorer.score(term.name, self.group(answers, term), id(self.spend))
        for warning in result.warnings:
            self.report.warn(f"reward '{term.label}': {warning}")
        self.spend.reward_calls += 1
        self.spend.reward_tokens += result.tokens
        return result.values

    def _calibrated_at(self, candidate: Candidate) -> int | None:
        """The length of the answers on which a candidate's transforms are fitted, in tokens; None for whole ones."""
        whole = candidate.finished or not any(term.chain.needs_sample for term in self.rewards)
        return None if whole else len(candidate.token_ids)

    def _begin(self) -> None:
        """Starts to draw what the transforms are fitted on, beside the guide's own work, at its first call."""
        if any(term.chain.needs_sample or term.chain.reference_answers for term in self.rewards):
            self._fit_task(None)

    def _fit_task(self, length: int | None) -> "asyncio.Task[Transforms]":
        if length not in self._fits:
            self._fits[length] = asyncio.create_task(self._fit(length))
        return self._fits[length]

    async def _transforms(self, length: int | None) -> Transforms:
        """The fitted transforms by label. Concurrent callers share one fit, which none of them can cancel."""
        return await asyncio.shield(self._fit_task(length))

    async def _fit(self, length: int | None) -> Transforms:
        whole = {} if length is None else await self._transforms(None)
        terms = [term for term in self.rewards if length is None or term.chain.needs_sample]
        fitted = await together(self._fit_term(term, length) for term in terms)
        return {**whole, **dict(zip((term.label for term in terms), fitted, strict=True))}

    async def _fit_term(self, term: RewardTerm, length: int | None) -> Callable[[Any], Any]:
        chain, sample = term.chain, None
        if chain.needs_sample:
            drawn = await self.helpers.sample(self, term, length)
            sample = np.array(drawn.values)
            if length is None:
                self.report.calibrated(term.label, drawn)
        references: dict[str, float] = {}
        if chain.reference_answers:
            answers = tuple(
                Answer(text, tuple(self.helpers.services.renderer.encode(text, plain=True)))
                for text in chain.reference_answers
            )
            references = dict(zip(chain.reference_answers, await self._raw(term, answers), strict=True))
        return chain.fit(sample, references)
