"""Speculative rejection: best-of-N that gives up unpromising answers while they are being written.

Sun et al., "Fast Best-of-N Decoding via Speculative Rejection", arXiv 2410.20290. N answers are started; at each
checkpoint the partial answers are scored and those below the alpha-quantile are rejected:
  keep the round((1 - alpha) |pool|) best of the pool; finished answers compete with partial ones.
The paper takes checkpoints when GPU memory runs out; here they are fixed places of the answer, so that results do not
depend on the machine: they part its `max_tokens` into S equal segments, by default one more than the rejections that
lead from n to `keep`, so that the last one is as far from the end as from the one before it. (`interval` sets them so
many tokens apart instead, whatever the answer's length: far from the end all that runs may be one answer.)
Rejected rows are aborted in the engine; survivors run on and keep their KV.

It rests on partial rewards telling final ones: measure Kendall's tau with `guiderail evaluate
partial-correlation` first. Answers of L tokens cost the sum over segments of what is alive there: with alpha 0.5 and
N = 2^(S - 1) it is (2 N - 1) L / S.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from guiderail.guides.core import guide as base
from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import DeadlinePassed
from guiderail.guides.core.guide import Guide, Rollouts, answer_events
from guiderail.guides.core.reward import Services
from guiderail.guides.core.types import Candidate, Delta, Event, Scored
from guiderail.guides.scoring import Origin, PoolKind
from guiderail.guides.search.sequence import Piece
from guiderail.guides.search.transcript import Transcript


class SpeculativeRejection(Guide):
    """Speculative rejection: best-of-N that drops the worst partial answers at checkpoints."""

    class Params(base.Params):
        n: int = Field(default=32, ge=1, le=4096, description="Answers that are started.")
        alpha: float = Field(default=0.5, ge=0, lt=1, description="Share of the pool that a checkpoint rejects.")
        segments: int | None = Field(
            default=None,
            ge=1,
            description="Equal parts of max_tokens between which answers are rejected; null: one more than rejections.",
        )
        interval: int | None = Field(
            default=None, ge=1, description="Tokens between checkpoints, in place of segments of max_tokens."
        )
        keep: int = Field(default=1, ge=1, description="Never fewer answers than this.")

    keeps_format: ClassVar[bool] = True

    def candidates(self) -> int:
        return int(self.params.n)

    def pools(self) -> dict[PoolKind, int]:
        return {"survivors": self.candidates()}

    def cost(self, max_tokens: int) -> int:
        """Tokens that answers of `max_tokens` take, all of one speed.

        The rows run on while a checkpoint is scored or some row lags: what they write in that time is on top.
        """
        alive, done, tokens = self.candidates(), 0, 0
        for checkpoint in self.checkpoints(max_tokens):
            tokens += alive * (checkpoint - done)
            alive, done = self._left(alive), checkpoint
        return int(tokens + alive * (max_tokens - done))

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
        """How many of so many answers a checkpoint leaves."""
        return int(min(alive, max(self.params.keep, round((1 - self.params.alpha) * alive))))

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        n = self.params.n
        sampling = replace(ctx.sampling, stream=True)
        async with ctx.generate([ctx.prompt] * n, sampling, ctx.seeds(n)) as rollouts:
            pool = _Pool(ctx, rollouts, n)
            checkpoints = self.checkpoints(sampling.max_tokens)
            async for delta in rollouts:
                pool.take(delta)
                while checkpoints and pool.reached(checkpoints[0]):
                    await self._reject(pool, checkpoints.pop(0))
        answers = [pool.answer(row) for row in sorted(pool.alive)]
        stopped_by = next((a.finish_reason for a in answers if a.finish_reason in ("deadline", "budget")), None)
        whole = [a for a in answers if a.finished] or [a for a in answers if a.token_ids]
        if not whole:
            raise DeadlinePassed("the deadline passed before any candidate had a token")
        await ctx.score([a for a in whole if not a.transformed])
        everything = [pool.answer(row) for row in range(n)]
        yield Scored(tuple(everything))
        for event in answer_events(await ctx.select(whole, Origin("survivors", n)), everything, stopped_by):
            yield event

    async def _reject(self, pool: "_Pool", checkpoint: int) -> None:
        """Scores the pool at a checkpoint and drops the worst of it."""
        rows = sorted(pool.alive)
        keep = self._left(len(rows))
        if keep == len(rows):
            return
        ranked = await pool.rated(rows, checkpoint)
        await pool.drop(ranked[keep:])


class _Pool:
    """The rows that are alive, what they wrote, and their finished answers."""

    def __init__(self, ctx: Context, rollouts: Rollouts, n: int) -> None:
        self._ctx = ctx
        self._rollouts = rollouts
        self._transcript = Transcript(ctx)
        self._pieces = [Piece() for _ in range(n)]
        self._answers: dict[int, Candidate] = {}
        self.alive = set(range(n))

    def take(self, delta: Delta) -> None:
        """Adds a delta of the engine to its row."""
        piece = self._pieces[delta.row]
        piece.text += delta.text
        piece.token_ids.extend(delta.token_ids)
        piece.logprobs.extend(delta.logprobs or ())
        if delta.finish_reason is not None:
            piece.finish_reason, piece.stop_reason = delta.finish_reason, delta.stop_reason

    def reached(self, checkpoint: int) -> bool:
        """Whether some living row goes on beyond so many tokens, and each that does is there.

        Which row is faster makes no difference: one that ended further on, while others lag, was going on here.
        """
        pieces = [self._pieces[row] for row in self.alive]
        if any(piece.cut_short for piece in pieces):
            return False
        beyond = [piece for piece in pieces if not piece.finish_reason or len(piece.token_ids) > checkpoint]
        return bool(beyond) and all(len(piece.token_ids) >= checkpoint for piece in beyond)

    def answer(self, row: int) -> Candidate:
        """What a row wrote, as a candidate; always the same object once it is finished."""
        if row in self._answers:
            return self._answers[row]
        piece = self._pieces[row]
        answer = Candidate(
            row, piece.text, tuple(piece.token_ids), piece.finish_reason or "partial", piece.stop_reason,
            tuple(piece.logprobs) or None,
        )  # fmt: skip
        if piece.finish_reason:
            self._answers[row] = answer
        return answer

    async def rated(self, rows: Sequence[int], checkpoint: int) -> list[int]:
        """The rows by falling reward of what they had at the checkpoint; finished ones by their whole answer."""
        at = []
        for row in rows:
            piece = self._pieces[row]
            if piece.finish_reason in ("stop", "length") and len(piece.token_ids) <= checkpoint:
                at.append(self.answer(row))
            else:
                at.append(self._transcript.candidate(row, Piece("", piece.token_ids[:checkpoint])))
        await self._ctx.score([candidate for candidate in at if not candidate.transformed])
        self._ctx.rate(at)
        return [rows[i] for i in sorted(range(len(rows)), key=lambda i: at[i].order)]

    async def drop(self, rows: Sequence[int]) -> None:
        """Gives rows up and frees their work in the engine."""
        self.alive -= set(rows)
        await asyncio.gather(*(self._rollouts.drop(row, "rejected") for row in rows))
