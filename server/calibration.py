"""Calibration samples: a reward's raw values under the base policy, stored by the operator or drawn on the fly.

A pool of drawn answers belongs to a prompt and its sampling parameters. Equal requests share it, also while it
is being drawn; it goes on as long as one of them waits. A request whose deadline comes first takes what there is.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from guiderail.guides.calibration import CalibrationSample
from guiderail.guides.context import Context
from guiderail.guides.errors import DeadlinePassed, RequestError
from guiderail.guides.pipeline import RewardTerm
from guiderail.guides.types import Answer, SamplingSpec, ScoreGroup, TokenPrompt
from guiderail.server.calibration_store import StoredCalibration, params_key, prompt_key
from guiderail.server.metrics import Metrics

SEEDS_APART = 2**40  # from the seeds of candidates: a pool must not be made of the candidates themselves
FEWEST = 2  # answers without which nothing can be calibrated


@dataclass(slots=True)
class _Pool:
    answers: list[Answer] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = None
    waiting: int = 0
    values: dict[Any, "asyncio.Task[tuple[float, ...]]"] = field(default_factory=dict)


class Calibrator:
    """Finds the calibration sample of a reward for a request."""

    def __init__(self, stored: Sequence[StoredCalibration], metrics: Metrics, max_pools: int = 256) -> None:
        """Keeps at most `max_pools` drawn pools, dropping the least recently used."""
        self._stored = {(each.reward, each.params): each for each in stored}
        self._metrics = metrics
        self._max_pools = max_pools
        self._pools: OrderedDict[Any, _Pool] = OrderedDict()

    async def sample(self, ctx: Context, term: RewardTerm) -> CalibrationSample:
        """The sample, and where it is from. Raises RequestError, RewardFailed, DeadlinePassed, EngineUnavailable."""
        sample = self._from_store(ctx, term)
        if sample is None:
            sample = await self._drawn(ctx, term)
        self._metrics.calibrated(sample.source)
        return sample

    def _from_store(self, ctx: Context, term: RewardTerm) -> CalibrationSample | None:
        if ctx.calibration.source == "drawn":
            return None
        stored = self._stored.get((term.name, params_key(term.params)))
        if stored is not None:
            own = stored.values.get(prompt_key(ctx.prompt))
            if own is not None:
                return CalibrationSample(own, "stored")
            return CalibrationSample(stored.pooled, "stored_pooled")
        if ctx.calibration.source == "stored":
            known = ", ".join(sorted(name for name, _ in self._stored)) or "none"
            where = "alignment.calibration.source"
            raise RequestError(
                f"'{where}': no stored calibration of reward '{term.name}' with these parameters; stored: {known}",
                where,
            )
        return None

    async def _drawn(self, ctx: Context, term: RewardTerm) -> CalibrationSample:
        sampling = replace(ctx.sampling, stream=False, logprobs=None, priority=0)
        n = ctx.calibration.n
        key = (ctx.prompt, _frozen(sampling), n)
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
        if len(pool.answers) < FEWEST:
            raise DeadlinePassed(f"the deadline passed before {FEWEST} of {n} calibration answers were drawn")
        values = await self._values(pool, ctx, term)
        return CalibrationSample(values, "drawn" if mine else "shared")

    async def _draw(self, pool: _Pool, ctx: Context, sampling: SamplingSpec, n: int) -> None:
        seed = sampling.seed
        seeds = [None if seed is None else (seed + SEEDS_APART + i) % 2**63 for i in range(n)]
        spend = ctx.spend
        parts: list[tuple[str, tuple[int, ...]]] = [("", ())] * n
        prompts: list[TokenPrompt] = [ctx.prompt] * n
        async with ctx.engine.generate(prompts, sampling, seeds=seeds) as rollouts:
            async for delta in rollouts:
                text, ids = parts[delta.row]
                parts[delta.row] = text, ids = text + delta.text, (*ids, *delta.token_ids)
                spend.calibration_tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    pool.answers.append(Answer(text, ids))

    async def _values(self, pool: _Pool, ctx: Context, term: RewardTerm) -> tuple[float, ...]:
        answers = tuple(pool.answers)
        key = (term.name, params_key(term.params), len(answers))
        task = pool.values.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            group = ScoreGroup(ctx.messages, ctx.prompt, answers, term.params)
            task = pool.values[key] = asyncio.create_task(self._score(ctx, term.name, group, id(pool)))
        return await asyncio.shield(task)

    @staticmethod
    async def _score(ctx: Context, reward: str, group: ScoreGroup, owner: int) -> tuple[float, ...]:
        result = await ctx.scorer.score(reward, group, owner)
        ctx.spend.reward_calls += 1
        ctx.spend.reward_tokens += result.tokens
        return result.values

    def _trim(self) -> None:
        idle = [key for key, pool in self._pools.items() if not pool.waiting and pool.task and pool.task.done()]
        for key in idle[: max(0, len(self._pools) - self._max_pools)]:
            del self._pools[key]


def _left(ctx: Context) -> float | None:
    return None if ctx.limits.deadline is None else max(0.0, ctx.limits.deadline - time.monotonic())


def _frozen(sampling: SamplingSpec) -> Any:
    """A hashable stand-in: the fields that are mappings by their content."""
    return (
        repr(sorted(sampling.logit_bias.items())),
        repr(sampling.json_schema),
        replace(sampling, logit_bias=(), json_schema=None),  # type: ignore[arg-type]
    )
