"""Speculative rejection: best-of-N that gives up unpromising answers while they are being written.

Sun et al., "Fast Best-of-N Decoding via Speculative Rejection", arXiv 2410.20290. N answers are started; at each
checkpoint the partial answers are scored and those below the alpha-quantile are rejected:
  keep the round((1 - alpha) |pool|) best of the pool; finished answers compete with partial ones.
The paper takes checkpoints when GPU memory runs out; here they are fixed places of the answer, so that results do not
depend on the machine: they part its `max_tokens` into S equal segments, by default one more than the rejections that
lead from n to `keep`, so that the last one is as far from the end as from the one before it. (`interval` sets them so
many tokens apart instead, whatever the answer's length: far from the end all that runs may be one answer.)
Rejected sequences are aborted in the engine; survivors run on and keep their KV.

It rests on partial rewards telling final ones: measure Kendall's tau with `guiderail evaluate
partial-correlation` first. Answers of L tokens cost the sum over segments of what is alive there: with alpha 0.5 and
N = 2^(S - 1) it is (2 N - 1) L / S.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from guiderail.guides.best_of_n import in_place
from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import DeadlinePassed
from guiderail.guides.core.guide import Guide, answer_events
from guiderail.guides.core.interfaces import Rollouts, Services
from guiderail.guides.core.types import Candidate, Event, Params, Scored
from guiderail.guides.scoring.kl import Origin, PoolKind
from guiderail.guides.scoring.scores import Scores
from guiderail.guides.search.sequence import Piece
from guiderail.guides.search.transcript import Transcript


class SpeculativeRejectionParams(Params):
    n: int = Field(default=32, ge=1, le=4096, description="Answers that are started.")
    alpha: float = Field(default=0.5, ge=0, lt=1, description="Share of the pool that a checkpoint rejects.")
    segments: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Equal parts of max_tokens between which answers are rejected; null: one more than rejections.",
    )
    interval: int | None = Field(
        default=None, ge=1, description="Tokens between checkpoints, in place of segments of max_tokens."
    )
    keep: int = Field(default=1, ge=1, description="Never fewer answers than this.")


class SpeculativeRejection(Guide[SpeculativeRejectionParams]):
    """Speculative rejection: best-of-N that drops the worst partial answers at checkpoints."""

    Params = SpeculativeRejectionParams

    keeps_format: ClassVar[bool] = True

    def candidates(self) -> int:
        return self.params.n

    def pools(self) -> dict[PoolKind, int]:
        return {"survivors": self.candidates()}

    def cost(self, max_tokens: int) -> int:
        """Tokens that answers of `max_tokens` take, all of one speed.

        The sequences run on while a checkpoint is scored or some sequence lags: what they write in that time is on top.
        """
        alive, done, tokens = self.candidates(), 0, 0
        for checkpoint in self.checkpoints(max_tokens):
            tokens += alive * (checkpoint - done)
            alive, done = self._left(alive), checkpoint
        return tokens + alive * (max_tokens - done)

    def checkpoints(self, max_tokens: int) -> list[int]:
        """After how many tokens of an answer of `max_tokens` the pool is scored, ascending."""
        if self.params.interval is not None:
            return list(range(self.params.interval, max_tokens, self.params.interval))
        segments = self.params.segments
        if segments is None:
            alive, segments = self.candidates(), 1
            while self._left(alive) < alive:
                alive, segments = self._left(alive), segments + 1
        return sorted({-(-i * max_tokens // segments) for i in range(1, segments)} - {max_tokens})

    def check(self, services: Services) -> None:
        if self.params.interval is not None and self.params.segments is not None:
            raise ValueError("'segments' and 'interval' both place the checkpoints: give one of them")

    def _left(self, alive: int) -> int:
        """Number of answers that a checkpoint leaves of so many."""
        return min(alive, max(self.params.keep, round((1 - self.params.alpha) * alive)))

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        n = self.params.n
        sampling = replace(ctx.sampling, stream=True)
        async with ctx.generate([ctx.prompt] * n, sampling, ctx.seeds.stream(n)) as rollouts:
            pool = _Pool(ctx, rollouts, n)
            checkpoints = self.checkpoints(sampling.max_tokens)
            async for delta in rollouts:
                pool.pieces[delta.row].take(delta)
                while checkpoints and pool.reached(checkpoints[0]):
                    await self._reject(pool, checkpoints.pop(0))
        answers = [pool.pieces[i].candidate(i) for i in sorted(pool.alive)]
        stopped_by = next((a.finish_reason for a in answers if a.finish_reason in ("deadline", "budget")), None)
        whole = [a for a in answers if a.finished] or [a for a in answers if a.token_ids]
        if not whole:
            raise DeadlinePassed("the deadline passed before any candidate had a token")
        pick = await ctx.select(await pool.scores(whole), Origin("survivors", n))
        everything = in_place(pool.answers(), pick.candidates)
        yield Scored(everything)
        for event in answer_events(pick.chosen, everything, stopped_by):
            yield event

    async def _reject(self, pool: "_Pool", checkpoint: int) -> None:
        """Score the pool at a checkpoint and drop the worst of it."""
        keep = self._left(len(pool.alive))
        if keep < len(pool.alive):
            await pool.drop((await pool.ranked(checkpoint))[keep:])


class _Pool:
    """The sequences that are alive, what they wrote, and the scores of those that are finished."""

    def __init__(self, ctx: Context, rollouts: Rollouts, n: int) -> None:
        self._ctx = ctx
        self._rollouts = rollouts
        self._transcript = Transcript(ctx)
        self._known: dict[int, tuple[Scores, int]] = {}  # table and row of finished answers, as they were last compared
        self.pieces = [Piece() for _ in range(n)]
        self.alive = set(range(n))

    def reached(self, checkpoint: int) -> bool:
        """True if some living sequence goes on beyond so many tokens, and each that does is there.

        Which sequence is faster makes no difference: one that ended further on, while others lag, was going on here.
        """
        beyond = False
        for i in self.alive:
            piece = self.pieces[i]
            if piece.cut_short or (not piece.finish_reason and len(piece.token_ids) < checkpoint):
                return False
            beyond |= not piece.finish_reason or len(piece.token_ids) > checkpoint
        return beyond

    async def ranked(self, checkpoint: int) -> list[int]:
        """Numbers of the living by falling reward of what they had at the checkpoint, or of their whole answer."""
        at = []
        for i in sorted(self.alive):
            piece = self.pieces[i]
            if piece.finish_reason in ("stop", "length") and len(piece.token_ids) <= checkpoint:
                at.append(piece.candidate(i))
            else:
                at.append(self._transcript.candidate(i, Piece("", piece.token_ids[:checkpoint])))
        scores = await self.scores(at)
        return [at[row].index for row in scores.order]

    async def scores(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores of candidates as a group; a finished answer is scored once."""
        new = [candidate for candidate in candidates if candidate.index not in self._known]
        found = await self._ctx.score(new)
        places = self._known | {candidate.index: (found, row) for row, candidate in enumerate(new)}
        scores = Scores.gather([places[candidate.index] for candidate in candidates])
        for row, candidate in enumerate(candidates):
            if candidate.finished and self.pieces[candidate.index].finish_reason:
                self._known[candidate.index] = scores, row
        return scores

    def answers(self) -> tuple[Candidate, ...]:
        """All answers, those that were compared with their scores."""
        scored = [scores.candidates[row] for scores, row in self._known.values()]
        return in_place([piece.candidate(i) for i, piece in enumerate(self.pieces)], scored)

    async def drop(self, numbers: Sequence[int]) -> None:
        """Give sequences up and free their work in the engine."""
        self.alive -= set(numbers)
        await asyncio.gather(*(self._rollouts.drop(i, "rejected") for i in numbers))
