"""Calibration samples: a reward's raw values under the base policy, stored by the operator or drawn on the fly.

A pool of drawn answers belongs to all that its values depend on: the prompt, the conversation as rewards read it, the
prompter, whose cleaner the answers go through as candidates do, and the sampling parameters, the seed among them. So
with a seed it is the same whatever other requests came before. Equal requests share it, also while it is being drawn;
it goes on as long as one of them waits. A request whose deadline comes first takes what there is.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import DeadlinePassed, RequestError
from guiderail.guides.core.guide import ScoreResult
from guiderail.guides.core.seeds import CALIBRATION, Seeds
from guiderail.guides.core.types import Answer, SamplingSpec, ScoreGroup, TokenPrompt
from guiderail.guides.scoring import RewardTerm
from guiderail.guides.scoring.calibration_sample import CalibrationSample
from guiderail.server.metrics import Metrics
from guiderail.server.scoring.calibration_file import StoredCalibration, params_key, prompt_key

FEWEST = 2  # answers without which nothing can be calibrated


@dataclass(slots=True)
class _Pool:
    drawn: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # text and tokens, as they came
    task: "asyncio.Task[None] | None" = None
    waiting: int = 0
    values: dict[Any, "asyncio.Task[ScoreResult]"] = field(default_factory=dict)


class Calibrator:
    """Finds the calibration sample of a reward for a request."""

    def __init__(self, stored: Sequence[StoredCalibration], metrics: Metrics, max_pools: int = 256) -> None:
        """Keeps at most `max_pools` drawn pools, dropping the least recently used."""
        self._stored: dict[tuple[str, str], list[StoredCalibration]] = {}
        for each in stored:
            self._stored.setdefault((each.reward, each.params), []).append(each)
        self._metrics = metrics
        self._max_pools = max_pools
        self._pools: OrderedDict[Any, _Pool] = OrderedDict()

    async def sample(self, ctx: Context, term: RewardTerm, length: int | None = None) -> CalibrationSample:
        """The sample, and where it is from. Raises RequestError, RewardFailed, DeadlinePassed, EngineUnavailable.

        length: the answers are cut after so many tokens. Stored values are of whole answers only; where they have to
        do for partial ones, a warning says so.
        """
        sample = self._from_store(ctx, term)
        if sample is None:
            sample = await self._drawn(ctx, term, length)
        elif length is not None:
            ctx.report.warn(
                f"reward '{term.label}': partial answers are calibrated on stored values of whole ones; "
                "with calibration.source 'drawn' they are on answers cut at their own length"
            )
        if length is None:
            self._metrics.calibrated(sample.source)
        return sample

    def _from_store(self, ctx: Context, term: RewardTerm) -> CalibrationSample | None:
        source = ctx.calibration.source
        if source == "drawn":
            return None
        why = "there is none of this reward with these parameters; stored: " + (
            ", ".join(sorted({name for name, _ in self._stored})) or "none"
        )
        for stored in self._stored.get((term.name, params_key(term.params)), ()):
            if unlike := stored.unlike(ctx):
                why = "its answers were sampled otherwise: " + ", ".join(unlike)
                continue
            own = stored.values.get(prompt_key(ctx.prompt))
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

    async def _drawn(self, ctx: Context, term: RewardTerm, length: int | None) -> CalibrationSample:
        sampling = replace(ctx.sampling, stream=False, logprobs=None, priority=0)
        n = ctx.calibration.n
        key = (ctx.prompt, ctx.view, repr(ctx.prompter.dump()), _frozen(sampling), n)
        pool = self._pools.get(key)
        mine = pool is None
        if pool is None:
            pool = self._pools[key] = _Pool()
            pool.task = asyncio.create_task(self._draw(pool, ctx, sampling, n))
            self._trim()
        self._pools.move_to_end(key)
        assert pool.task is not None
        pool.waiting += 1
        try:
            await asyncio.wait({pool.task}, timeout=_left(ctx))
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
        result = await self._values(pool, ctx, term, length)
        for warning in result.warnings:
            ctx.report.warn(f"reward '{term.label}': {warning}")
        return CalibrationSample(result.values, "drawn" if mine else "shared")

    async def _draw(self, pool: _Pool, ctx: Context, sampling: SamplingSpec, n: int) -> None:
        seeds = Seeds(sampling.seed).stream(n, CALIBRATION)  # a pool must not be made of the candidates themselves
        spend = ctx.spend
        parts: list[tuple[str, tuple[int, ...]]] = [("", ())] * n
        prompts: list[TokenPrompt] = [ctx.prompt] * n
        async with ctx.engine.generate(prompts, sampling, seeds=seeds) as rollouts:
            async for delta in rollouts:
                text, ids = parts[delta.row]
                parts[delta.row] = text, ids = text + delta.text, (*ids, *delta.token_ids)
                spend.calibration_tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    pool.drawn.append(parts[delta.row])

    async def _values(self, pool: _Pool, ctx: Context, term: RewardTerm, length: int | None) -> ScoreResult:
        key = (term.name, params_key(term.params), len(pool.drawn), length)
        task = pool.values.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            answers = tuple(_read(ctx, text, ids, length) for text, ids in pool.drawn)
            task = pool.values[key] = asyncio.create_task(
                self._score(ctx, term.name, ctx.group(answers, term), id(pool))
            )
        return await asyncio.shield(task)

    @staticmethod
    async def _score(ctx: Context, reward: str, group: ScoreGroup, owner: int) -> ScoreResult:
        result = await ctx.scorer.score(reward, group, owner)
        ctx.spend.reward_calls += 1
        ctx.spend.reward_tokens += result.tokens
        return result

    def _trim(self) -> None:
        idle = [key for key, pool in self._pools.items() if not pool.waiting and pool.task and pool.task.done()]
        for key in idle[: max(0, len(self._pools) - self._max_pools)]:
            del self._pools[key]


def _read(ctx: Context, text: str, ids: tuple[int, ...], length: int | None) -> Answer:
    """A drawn answer as rewards read candidates: cleaned, and cut after `length` tokens if it goes on there."""
    if length is None or len(ids) <= length:
        return ctx.answer(text, ids)
    ids = ids[:length]
    return ctx.answer(ctx.decoder().text(ids), ids, partial=True)


def _left(ctx: Context) -> float | None:
    return None if ctx.limits.deadline is None else max(0.0, ctx.limits.deadline - time.monotonic())


def _frozen(sampling: SamplingSpec) -> Any:
    """A hashable stand-in: the fields that are mappings by their content."""
    return (
        repr(sorted(sampling.logit_bias.items())),
        repr(sampling.json_schema),
        replace(sampling, logit_bias=(), json_schema=None),  # type: ignore[arg-type]
    )
