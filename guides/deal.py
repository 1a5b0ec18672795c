"""DeAL: beam search whose heuristic looks ahead to what a partial answer will be worth.

Huang et al., "DeAL: Decoding-time Alignment for Large Language Models", arXiv 2402.06147, section 3. A search
from the start state p (an alignment instruction and the input) with, at each step, the top-k tokens of each beam, a
lookahead of l tokens, and
  c(y_t) = log P(y_1:t | p) + lambda h(y_1:t+l, p),    h any mix of rewards, programmatic or parametric.
The `beams` candidates of the largest c go on. With hard constraints a candidate whose h is below `threshold` is
dropped; where none keeps it, those nearest to it go on.

A finished beam keeps its place and its c, with h of the whole answer, and competes with unfinished ones on the same
scale; log P is a sum over tokens, divided by (tokens ** length_penalty). The search ends when all beams are finished.
With one beam the request's selection rule picks at each step, else it picks among the beams at the end.

Costs B (1 + k l) tokens and B k scores a token. Text is committed once all beams agree on it.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from guiderail.guides.core.context import Context
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.core.tasks import together
from guiderail.guides.core.types import Candidate, Event, Factor, Params
from guiderail.guides.scoring.kl import Origin, PoolKind
from guiderail.guides.scoring.scores import Scores
from guiderail.guides.scoring.transforms import Array
from guiderail.guides.search.lookahead import Lookahead, roll_forward, successors, value
from guiderail.guides.search.sequence import Piece
from guiderail.guides.search.stepwise import MAX_TOP_K, UNKEPT, Steps, top_tokens
from guiderail.guides.search.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Beam:
    """A partial answer that the search keeps, or one that it considers: `transcript` with `piece` behind it.

    tails: its rollouts. scores: of it alone, with their means, once it is kept.
    """

    transcript: Transcript
    log_p: float = 0.0
    piece: Piece = field(default_factory=Piece)
    tails: Sequence[Piece] = ()
    scores: Scores | None = None

    @property
    def finished(self) -> bool:
        """True for a whole answer."""
        return self.scores is not None and self.scores.plain[0].finished

    def kept(self, scores: Scores) -> "Beam":
        """The beam with its piece taken into the transcript, and the scores that it was kept with."""
        transcript = self.transcript
        if self.piece.token_ids:
            transcript = transcript.fork()
            transcript.commit(self.piece)
        return Beam(transcript, self.log_p, Piece(), self.tails, scores)


class DealParams(Params):
    beams: int = Field(default=1, ge=1, le=64, description="Partial answers kept after each step.")
    top_k: int = Field(default=10, ge=1, le=MAX_TOP_K, description="Tokens by which each beam is expanded.")
    lookahead: int | None = Field(default=20, ge=0, description="Tokens of the lookahead; null: to the end.")
    sampled: bool = Field(default=False, description="Sample the lookahead instead of decoding it greedily.")
    weight: Factor = Field(default=1.0, description="lambda: weight of the heuristic against log P.")
    threshold: float | None = Field(
        default=None, description="Hard constraint: a candidate whose combined reward is below it is dropped."
    )
    length_penalty: float = Field(default=0.0, ge=0, le=2, description="log P is divided by tokens ** this.")
    instruction: str | None = Field(
        default=None,
        min_length=1,
        description="Alignment instruction, told behind the conversation's own system message.",
    )


class Deal(Guide[DealParams]):
    """DeAL: beam search over tokens with a lookahead heuristic made of rewards."""

    Params = DealParams

    streams: ClassVar[bool] = True

    def candidates(self) -> int:
        return self.params.beams * self.params.top_k

    def pools(self) -> dict[PoolKind, int]:
        return {"tokens": self.params.top_k} if self.params.beams == 1 else {"beams": self.params.beams}

    def cost(self, max_tokens: int) -> int:
        p = self.params
        ahead = max_tokens if p.lookahead is None else min(p.lookahead, max_tokens)
        return p.beams * max_tokens * (1 + p.top_k * ahead)

    def refuses(self) -> tuple[str, ...]:
        return UNKEPT

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        start = PolicySpec(system=self.params.instruction).policy(ctx.dialogue, "instruction")
        ctx = ctx.telling(start.told).with_policy(start.prompt)  # of all candidates, and of the answers that calibrate
        steps = Steps(ctx, "tokens")
        beams = [Beam(steps.transcript.fork())]
        ended: Scores | None = None
        while steps.go_on(len(beams)):
            open_ = [beam for beam in beams if not beam.finished]
            found = await together(self._expand(ctx, beam, steps.count, i) for i, beam in enumerate(open_))
            new = [beam for expanded, _ in found for beam in expanded]
            if steps.cut_short([tail for beam in new for tail in beam.tails], [] if steps.count else [new[0].piece]):
                break
            whole = [beam for beam in beams if beam.finished]
            considered = [*whole, *new]
            tables = [*(beam.scores for beam in whole if beam.scores is not None), *(scores for _, scores in found)]
            h, scores = self._score(considered, tables)
            rows = await self._keep(ctx, considered, h, scores)
            beams = [considered[row].kept(scores.take([row])) for row in rows]
            if all(beam.finished for beam in beams):
                best = await self._best(ctx, beams, h[rows], scores.take(rows))
                beams, ended = [beams[best]], beams[best].scores
            for event in steps.catch_up([beam.transcript for beam in beams], scores.candidates, ended):
                yield event
        if ended is None and steps.count:  # a limit: the best beam is the answer, a finished one before others
            last = next((beam for beam in beams if beam.finished), beams[0])
            if self.params.beams > 1:
                ctx.report.moved(-last.log_p)
            for event in steps.catch_up([last.transcript], [], last.scores if last.finished else None):
                yield event
        async for event in steps.end():
            yield event

    async def _expand(self, ctx: Context, beam: Beam, step: int, number: int) -> tuple[list[Beam], Scores]:
        """The beam's successors, its top-k tokens, each with a lookahead; and their scores."""
        p, transcript = self.params, beam.transcript
        ahead = Lookahead(ctx.prompt, 0 if p.lookahead == 0 else 1, p.lookahead or None, None if p.sampled else 0.0)
        pieces = await top_tokens(ctx, transcript, p.top_k)
        known = successors(beam.tails)
        reused = [known.get(tuple(piece.token_ids), []) for piece in pieces]
        tails = await roll_forward(ctx, transcript, pieces, ahead, step, reused, f"beam {number}")
        scores = await value(ctx, transcript, pieces, tails)
        expanded = [
            Beam(transcript, beam.log_p + piece.logprobs[0].logprob, piece, tail)
            for piece, tail in zip(pieces, tails, strict=True)
        ]
        return expanded, scores

    def _score(self, considered: list[Beam], tables: list[Scores]) -> tuple[Array, Scores]:
        """The heuristic h [C] of all that is considered, whose rewards are in the tables, and c = log P + lambda h."""
        p = self.params
        scores = Scores.join(tables)
        lengths = [len(beam.transcript.token_ids) + len(beam.piece.token_ids) for beam in considered]
        log_p = np.array([beam.log_p / n**p.length_penalty for beam, n in zip(considered, lengths, strict=True)])
        numbered = [
            Candidate(i, c.text, c.token_ids, c.finish_reason, c.stop_reason, c.logprobs)
            for i, c in enumerate(scores.plain)
        ]
        c = scores.with_combined(log_p + p.weight * scores.combined)
        return scores.combined, replace(c, plain=tuple(numbered))

    async def _keep(self, ctx: Context, considered: list[Beam], h: Array, scores: Scores) -> list[int]:
        """The rows that go on, the best first."""
        p = self.params
        none_keeps = p.threshold is not None and h.max() < p.threshold
        if none_keeps:
            ctx.report.warn("no candidate kept the threshold at some step, so the nearest to it went on there")
        pool = self._within(h)
        if p.beams == 1:
            log_prior = [considered[row].piece.logprobs[0].logprob for row in pool]
            within = scores if len(pool) == len(h) else scores.take(pool)
            pick = await ctx.select(within, Origin("tokens", log_prior=log_prior))
            return [pool[pick.row]]
        if none_keeps:
            return sorted(scores.order, key=lambda row: -h[row])[: p.beams]
        allowed = set(pool)
        return [row for row in scores.order if row in allowed][: p.beams]

    async def _best(self, ctx: Context, beams: list[Beam], h: Array, scores: Scores) -> int:
        """The row of the answer among whole ones."""
        if self.params.beams == 1:
            return 0  # as picked step by step
        pool = self._within(h)
        log_prior = [beams[row].log_p for row in pool]
        return pool[(await ctx.select(scores.take(pool), Origin("beams", log_prior=log_prior))).row]

    def _within(self, h: Array) -> list[int]:
        """Rows that keep the threshold; where none does, those nearest to it."""
        threshold = self.params.threshold
        return list(range(len(h))) if threshold is None else np.flatnonzero(h >= min(threshold, h.max())).tolist()
