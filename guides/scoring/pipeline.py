"""The reward pipeline of one answer: scores candidates, transforms and combines their rewards, and selects."""

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.errors import AlignmentField, DeadlinePassed, FieldError
from guiderail.guides.core.interfaces import Embedder, Judge, Scorer
from guiderail.guides.core.metering import MeteredEngine
from guiderail.guides.core.seeds import PICK, Seeds
from guiderail.guides.core.tasks import Background, together
from guiderail.guides.core.types import Answer, Candidate, SamplingSpec
from guiderail.guides.scoring.calibration import CalibrationSample, CalibrationSpec, Calibrator, Fits
from guiderail.guides.scoring.chain import RewardTerm
from guiderail.guides.scoring.combine import Combine
from guiderail.guides.scoring.kl import Origin
from guiderail.guides.scoring.scores import Combination, Scores
from guiderail.guides.scoring.selection.rule import Pool, Selection
from guiderail.guides.scoring.selection_report import SelectionReport
from guiderail.guides.scoring.transforms import Array

LATE_S = 5.0  # how far beyond the deadline answers that are there may be scored


@dataclass(frozen=True, slots=True)
class Judging:
    """A request's rewards, their combination, the selection rule and the calibration."""

    rewards: tuple[RewardTerm, ...]
    combine: Combine
    selection: Selection
    calibration: CalibrationSpec

    @property
    def draws(self) -> int:
        """Number of answers that calibration draws for a prompt at most."""
        drawn = self.calibration.source in ("auto", "drawn") and any(term.chain.needs_sample for term in self.rewards)
        return self.calibration.n if drawn else 0


@dataclass(frozen=True, slots=True)
class Scorers:
    """The parts of the server that the pipeline uses: one each for all requests."""

    scorer: Scorer
    calibrator: Calibrator
    embedder: Embedder
    judge: Judge


@dataclass(frozen=True, slots=True)
class Pick:
    """The choice among scored candidates.

    row: of the chosen one. candidates: with their scores and what the selection rule made of these.
    """

    row: int
    candidates: tuple[Candidate, ...]
    scores: Scores

    @property
    def chosen(self) -> Candidate:
        """The chosen one of `candidates`."""
        return self.candidates[self.row]


class RewardPipeline:
    """Scores and selects the candidates of one answer; what it finds out besides goes to `report`."""

    def __init__(
        self,
        dialogue: Dialogue,
        asked: Judging,
        scorers: Scorers,
        engine: MeteredEngine,
        seeds: Seeds,
        report: SelectionReport,
        owner: str,
        background: Background,
        picks: Iterator[int] | None = None,
    ) -> None:
        """owner: the request's id. background: where the fits run. picks: numbers the selections of the answer."""
        self.dialogue = dialogue
        self.asked = asked
        self._scorers = scorers
        self._engine = engine
        self._seeds = seeds
        self._report = report
        self._owner = owner
        self._background = background
        self._picks = itertools.count() if picks is None else picks
        self._combination = Combination(asked.combine, {term.label: term.weight for term in asked.rewards})
        self._fits = Fits(asked.rewards, self._sample, self._raw, dialogue.renderer, background)

    def of(self, dialogue: Dialogue) -> "RewardPipeline":
        """The pipeline of the same answer written by another policy."""
        return RewardPipeline(
            dialogue, self.asked, self._scorers, self._engine, self._seeds, self._report, self._owner,
            self._background, self._picks,
        )  # fmt: skip

    def begin(self) -> None:
        """Start to draw what transforms are fitted on, beside the guide's own work."""
        self._fits.begin()

    def sampling(self, sampling: SamplingSpec) -> SamplingSpec:
        """The sampling of candidates that the selection rule can choose from."""
        if self.asked.selection.needs_logprobs and sampling.logprobs is None:
            return replace(sampling, logprobs=0)
        return sampling

    async def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores of the candidates, for all rewards of the request.

        Whole answers are calibrated on whole ones, a partial answer on the policy's answers cut at its own length:
        among whole answers each beginning would be the shortest, and a reward that grows with length lowest of all.

        Raises RewardFailed if a reward fails or returns a value that is not finite.
        """
        terms = self.asked.rewards if candidates else ()
        raw: dict[str, Array] = {}
        transformed: dict[str, Array] = {}
        if terms:
            read = self.dialogue.answer
            answers = tuple(read(c.text, c.token_ids, partial=not c.finished) for c in candidates)
            spend = self._engine.spend
            with spend.scoring.span(), spend.working.span():
                results = await together(self._raw(term, answers) for term in terms)
                groups = self._by_length(candidates)
                fits = await together(map(self._fits.transforms, groups))
            for term, values in zip(terms, results, strict=True):
                column = raw[term.label] = np.array(values, dtype=np.float64)
                if len(fits) == 1:
                    transformed[term.label] = fits[0][term.label](column)
                    continue
                transformed[term.label] = np.empty(len(candidates))
                for group, fitted in zip(groups.values(), fits, strict=True):
                    transformed[term.label][group] = fitted[term.label](column[group])
        return self.table(candidates, raw, transformed)

    def table(
        self, candidates: Sequence[Candidate], raw: Mapping[str, Array], transformed: Mapping[str, Array]
    ) -> Scores:
        """Scores of candidates whose rewards [C] are known, by label."""
        return Scores(tuple(candidates), raw, transformed, self._combination)

    async def select(self, scores: Scores, origin: Origin | None = None) -> Pick:
        """The selection rule's choice among scored candidates. Raises RequestError if it cannot choose.

        origin: how the candidates were made; None: the answer's KL from the policy is reported as unknown.
        """
        combined, dialogue, candidates = scores.combined, self.dialogue, scores.plain
        (seed,) = self._seeds.stream(1, PICK, next(self._picks))
        begun = dialogue.begun
        texts = [begun + dialogue.clean(candidate.text) for candidate in candidates]
        tokens = origin is not None and origin.kind == "tokens"
        rule = self.asked.selection
        rule = rule.at(dialogue.sampling.temperature) if tokens else rule
        judge = self._scorers.judge
        try:
            pool = Pool(
                scores=combined,
                texts=texts,
                logprobs=[None if c.logprobs is None else sum(t.logprob for t in c.logprobs) for c in candidates],
                lengths=[len(candidate.token_ids) for candidate in candidates],
                seed=seed,
                embed=self._scorers.embedder.embed,
                prefer=lambda criterion, pairs: judge.prefer(dialogue.view, criterion, texts, pairs),
                ties=scores.ties,
                origin=origin,
            )
            choice = await rule.pick(pool)
        except ValueError as error:
            raise FieldError(AlignmentField("select"), f": {error}") from error
        self._report.picked(scores, choice)
        if choice.weights is None and choice.scores is None:
            return Pick(choice.index, scores.candidates, scores)
        return Pick(choice.index, scores.judged(choice.weights, choice.scores), scores)

    async def _raw(self, term: RewardTerm, answers: tuple[Answer, ...]) -> tuple[float, ...]:
        left = self._engine.remaining()
        try:
            async with asyncio.timeout(None if left is None else left + LATE_S):
                result = await self._scorers.scorer.score(
                    term.name, self.dialogue.group(answers, term.params), self._owner
                )
        except TimeoutError:
            raise DeadlinePassed(f"reward '{term.name}' had no scores {LATE_S:g} s after the deadline") from None
        self._warn(term, result.warnings)
        self._engine.spend.reward_calls += 1
        self._engine.spend.reward_tokens += result.tokens
        return result.values

    async def _sample(self, term: RewardTerm, length: int | None) -> CalibrationSample:
        sample = await self._scorers.calibrator.sample(
            self.dialogue, self._engine, self._scorers.scorer, term, self.asked.calibration, length
        )
        self._warn(term, sample.warnings)
        if length is None:
            self._report.calibrated(term.label, sample)
        return sample

    def _warn(self, term: RewardTerm, warnings: Sequence[str]) -> None:
        for warning in warnings:
            self._report.warn(f"reward '{term.label}': {warning}")

    def _by_length(self, candidates: Sequence[Candidate]) -> dict[int | None, list[int]]:
        """Places of the candidates by the length in tokens of the answers that calibrate them; None: of whole ones."""
        if not self._fits.by_length:
            return {None: list(range(len(candidates)))}
        groups: dict[int | None, list[int]] = {}
        for place, candidate in enumerate(candidates):
            groups.setdefault(None if candidate.finished else len(candidate.token_ids), []).append(place)
        return groups
