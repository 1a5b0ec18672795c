"""Calibration samples: a reward's raw values under the base policy, stored by the operator or drawn on the fly.

A pool of drawn answers belongs to all that its values depend on: the prompt, the conversation as rewards read it, the
prompter, whose cleaner the answers go through as candidates do, and the sampling parameters, the seed among them. So
with a seed it is the same whatever other requests came before. Equal requests share it, also while it is being drawn;
it goes on as long as one of them waits. A request whose deadline comes first takes what there is.
"""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.errors import DeadlinePassed, RequestError
from guiderail.guides.core.interfaces import Scorer, ScoreResult
from guiderail.guides.core.metering import MeteredEngine
from guiderail.guides.core.seeds import CALIBRATION, Seeds
from guiderail.guides.core.types import Answer, SamplingSpec
from guiderail.guides.scoring.calibration import CalibrationSample, CalibrationSpec
from guiderail.guides.scoring.chain import RewardTerm
from guiderail.guides.search.sequence import Piece
from guiderail.server.metrics import Metrics
from guiderail.server.scoring.calibration_file import StoredCalibration, params_key, prompt_key

FEWEST = 2  # answers without which nothing can be calibrated
STORED_FOR_PARTIAL = (
    "partial answers are calibrated on stored values of whole ones; "
    "with calibration.source 'drawn' they are on answers cut at their own length"
)


@dataclass(slots=True)
class _Pool:
    owner: str  # for the scorer
    drawn: list[Piece] = field(default_factory=list)  # as they came
    task: "asyncio.Task[None] | None" = None
    waiting: int = 0
    values: dict[Hashable, "asyncio.Task[ScoreResult]"] = field(default_factory=dict)


class Calibrator:
    """Finds the calibration sample of a reward for a request."""

    def __init__(self, stored: Sequence[StoredCalibration], metrics: Metrics, max_pools: int = 256) -> None:
        """Keeps at most `max_pools` drawn pools, dropping the least recently used."""
        self._stored: dict[tuple[str, str], list[StoredCalibration]] = {}
        for each in stored:
            self._stored.setdefault((each.reward, each.params), []).append(each)
        self._metrics = metrics
        self._max_pools = max_pools
        self._pools: OrderedDict[Hashable, _Pool] = OrderedDict()
        self._numbers = itertools.count()

    async def sample(
        self,
        dialogue: Dialogue,
        engine: MeteredEngine,
        scorer: Scorer,
        term: RewardTerm,
        spec: CalibrationSpec,
        length: int | None = None,
    ) -> CalibrationSample:
        """The sample, and where it is from. Raises RequestError, RewardFailed, DeadlinePassed, EngineUnavailable.

        length: the answers are cut after so many tokens. Stored values are of whole answers only; where they have to
        do for partial ones, a warning says so.
        """
        sample = self._from_store(dialogue, spec.source, term)
        if sample is None:
            pool, mine = await self._drawn(dialogue, engine, spec.n)
            result = await self._values(pool, dialogue, engine, scorer, term, length)
            sample = CalibrationSample(result.values, "drawn" if mine else "shared", result.warnings)
        elif length is not None:
            sample = replace(sample, warnings=(STORED_FOR_PARTIAL,))
        if length is None:
            self._metrics.calibrated(sample.source)
        return sample

    def _from_store(self, dialogue: Dialogue, source: str, term: RewardTerm) -> CalibrationSample | None:
        if source == "drawn":
            return None
        why = "there is none of this reward with these parameters; stored: " + (
            ", ".join(sorted({name for name, _ in self._stored})) or "none"
        )
        for stored in self._stored.get((term.name, params_key(term.params)), ()):
            if unlike := stored.unlike(dialogue):
                why = "its answers were sampled otherwise: " + ", ".join(unlike)
                continue
            own = stored.values.get(prompt_key(dialogue.prompt))
            if own is not None:
                return CalibrationSample(own, "stored")
            if source == "pooled":
                return CalibrationSample(stored.pooled, "stored_pooled")
            why = "it does not have this prompt ('pooled' takes all its prompts together)"
        if source == "auto":
            return None
        where = "alignment.calibration.source"
        raise RequestError(
            f"'{where}' is '{source}', but the stored calibration of '{term.name}' cannot serve: {why}", where
        )

    async def _drawn(self, dialogue: Dialogue, engine: MeteredEngine, n: int) -> tuple[_Pool, bool]:
        """The pool of n answers, as far as it is there at the deadline; True if this request began it."""
        sampling = replace(dialogue.sampling, stream=False, logprobs=None, priority=0)
        key = (dialogue.prompt, dialogue.view, repr(dialogue.prompter.dump()), _frozen(sampling), n)
        pool = self._pools.get(key)
        mine = pool is None
        if pool is None:
            pool = self._pools[key] = _Pool(f"calibration {next(self._numbers)}")
            pool.task = asyncio.create_task(self._draw(pool, dialogue, engine, sampling, n))
            self._trim()
        self._pools.move_to_end(key)
        assert pool.task is not None
        pool.waiting += 1
        try:
            await asyncio.wait({pool.task}, timeout=engine.remaining())
        finally:
            pool.waiting -= 1
            if not pool.waiting and not pool.task.done():
                pool.task.cancel()
                self._pools.pop(key, None)
        if pool.task.done() and not pool.task.cancelled() and (error := pool.task.exception()) is not None:
            if self._pools.get(key) is pool:
                del self._pools[key]
            raise error
        if len(pool.drawn) < FEWEST:
            raise DeadlinePassed(f"the deadline passed before {FEWEST} of {n} calibration answers were drawn")
        return pool, mine

    async def _draw(
        self, pool: _Pool, dialogue: Dialogue, engine: MeteredEngine, sampling: SamplingSpec, n: int
    ) -> None:
        seeds = Seeds(sampling.seed).stream(n, CALIBRATION)  # a pool must not be made of the candidates themselves
        pieces = [Piece() for _ in range(n)]
        async with engine.engine.generate([dialogue.prompt] * n, sampling, seeds=seeds) as rollouts:
            async for delta in rollouts:
                pieces[delta.row].take(delta)
                engine.spend.calibration_tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    pool.drawn.append(pieces[delta.row])

    async def _values(
        self,
        pool: _Pool,
        dialogue: Dialogue,
        engine: MeteredEngine,
        scorer: Scorer,
        term: RewardTerm,
        length: int | None,
    ) -> ScoreResult:
        async def score(answers: tuple[Answer, ...]) -> ScoreResult:
            result = await scorer.score(term.name, dialogue.group(answers, term.params), pool.owner)
            engine.spend.reward_calls += 1
            engine.spend.reward_tokens += result.tokens
            return result

        key = (term.name, params_key(term.params), len(pool.drawn), length)
        task = pool.values.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            answers = tuple(_read(dialogue, piece, length) for piece in pool.drawn)
            task = pool.values[key] = asyncio.create_task(score(answers))
        return await asyncio.shield(task)

    def _trim(self) -> None:
        idle = [key for key, pool in self._pools.items() if not pool.waiting and pool.task and pool.task.done()]
        for key in idle[: max(0, len(self._pools) - self._max_pools)]:
            del self._pools[key]


def _read(dialogue: Dialogue, piece: Piece, length: int | None) -> Answer:
    """A drawn answer as rewards read candidates: cleaned, and cut after `length` tokens if it goes on there."""
    ids = tuple(piece.token_ids)
    if length is None or len(ids) <= length:
        return dialogue.answer(piece.text, ids)
    return dialogue.answer(dialogue.decoder().text(ids[:length]), ids[:length], partial=True)


def _frozen(sampling: SamplingSpec) -> Hashable:
    """A hashable stand-in: the fields that are mappings by their content."""
    return (
        repr(sorted(sampling.logit_bias.items())),
        repr(sampling.json_schema),
        replace(sampling, logit_bias=(), json_schema=None),  # type: ignore[arg-type]
    )
