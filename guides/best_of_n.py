"""Best-of-N: draw N answers from the policy, score them, return the one the selection rule picks.

With argmax and a continuous reward the answer's law is N * u^(N-1) in the reward's quantile u, at
KL(policy || base) <= log N - (N-1)/N (Beirami et al. 2024, arXiv 2401.01879). Costs N answers of
generation and N scores per reward. Candidates are scored as they finish, not after the last.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from guiderail.guides.core import guide as base
from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import DeadlinePassed
from guiderail.guides.core.guide import Guide, answer_events
from guiderail.guides.core.seeds import POOL_SIZE
from guiderail.guides.core.tasks import task_group
from guiderail.guides.core.types import Candidate, Event, Scored
from guiderail.guides.scoring import Origin, PoolKind
from guiderail.guides.search.sequence import Piece, roll_out


class BestOfN(Guide):
    """Best-of-N: draws n answers, scores them all and returns the selected one."""

    class Params(base.Params):
        n: int = Field(default=16, ge=1, le=4096, description="Number of candidate answers drawn from the policy.")

    keeps_format: ClassVar[bool] = True

    def candidates(self) -> int:
        n: int = self.params.n
        return n

    def pools(self) -> dict[PoolKind, int]:
        return {"answers": self.candidates()}

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        n = self.params.n
        candidates = await draw_scored(ctx, ctx.selection.draws(n, ctx.seeds(1, stream=POOL_SIZE)[0]))
        stopped_by = next((c.finish_reason for c in candidates if not c.finished), None)
        pool = [c for c in candidates if c.transformed]
        if not pool:  # nothing was finished and scored in time: what there is has to do
            pool = [c for c in candidates if c.finished] or [c for c in candidates if c.token_ids]
            if not pool:
                raise DeadlinePassed("the deadline passed before any candidate had a token")
            await ctx.score(pool)
        yield Scored(tuple(candidates))
        for event in answer_events(
            await ctx.select(pool, Origin("answers", len(candidates), n)), candidates, stopped_by
        ):
            yield event


async def draw_scored(ctx: Context, n: int) -> list[Candidate]:
    """Draws n answers and scores each finished one as soon as it is there. Returned in row order.

    Answers cut off by deadline or budget come back unscored, as do those whose score the deadline overtook.
    """
    done: dict[int, Candidate] = {}
    async with task_group() as scoring:

        def finished(row: int, piece: Piece) -> None:
            done[row] = candidate = Candidate(
                row, piece.text, tuple(piece.token_ids), piece.finish_reason, piece.stop_reason,
                tuple(piece.logprobs) or None,
            )  # fmt: skip
            if candidate.finished:
                scoring.create_task(_score_in_time(ctx, candidate))

        await roll_out(ctx, [ctx.prompt] * n, replace(ctx.sampling, stream=False), ctx.seeds(n), finished)
    return [done[row] for row in range(n)]


async def _score_in_time(ctx: Context, candidate: Candidate) -> None:
    left = None if ctx.limits.deadline is None else max(0.0, ctx.limits.deadline - time.monotonic())
    with suppress(TimeoutError):
        async with asyncio.timeout(left):
            await ctx.score([candidate])
