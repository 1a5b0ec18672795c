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

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from pydantic import Field

from guiderail.guides.core import guide as base
from guiderail.guides.core.context import Context
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.core.tasks import together
from guiderail.guides.core.types import Candidate, Event
from guiderail.guides.scoring import Origin, PoolKind
from guiderail.guides.search.lookahead import Lookahead, roll_forward, successors, value
from guiderail.guides.search.sequence import Piece
from guiderail.guides.search.stepwise import MAX_TOP_K, UNKEPT, Steps, top_tokens
from guiderail.guides.search.transcript import Transcript


@dataclass(slots=True)
class Beam:
    """A partial answer that the search keeps, or one that it considers: `transcript` with `piece` behind it."""

    transcript: Transcript
    log_p: float = 0.0
    piece: Piece = field(default_factory=Piece)
    candidate: Candidate | None = None
    tails: list[Piece] = field(default_factory=list)
    h: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether it is a whole answer."""
        return self.candidate is not None and self.candidate.finished

    def kept(self) -> "Beam":
        """The beam with its piece taken into the transcript."""
        if self.piece.token_ids:
            self.transcript = self.transcript.fork()
            self.transcript.commit(self.piece)
            self.piece = Piece()
        return self


class Deal(Guide):
    """DeAL: beam search over tokens with a lookahead heuristic made of rewards."""

    class Params(base.Params):
        beams: int = Field(default=1, ge=1, le=64, description="Partial answers kept after each step.")
        top_k: int = Field(default=10, ge=1, le=MAX_TOP_K, description="Tokens by which each beam is expanded.")
        lookahead: int | None = Field(default=20, ge=0, description="Tokens of the lookahead; null: to the end.")
        sampled: bool = Field(default=False, description="Sample the lookahead instead of decoding it greedily.")
        weight: float = Field(default=1.0, ge=0, description="lambda: weight of the heuristic against log P.")
        threshold: float | None = Field(
            default=None, description="Hard constraint: a candidate whose combined reward is below it is dropped."
        )
        length_penalty: float = Field(default=0.0, ge=0, le=2, description="log P is divided by tokens ** this.")
        instruction: str | None = Field(
            default=None,
            min_length=1,
            description="Alignment instruction, told behind the conversation's own system message.",
        )

    streams: ClassVar[bool] = True

    def candidates(self) -> int:
        return int(self.params.beams * self.params.top_k)

    def pools(self) -> dict[PoolKind, int]:
        return {"tokens": self.params.top_k} if self.params.beams == 1 else {"beams": self.params.beams}

    def cost(self, max_tokens: int) -> int:
        p = self.params
        ahead = max_tokens if p.lookahead is None else min(p.lookahead, max_tokens)
        return int(p.beams * max_tokens * (1 + p.top_k * ahead))

    def refuses(self) -> tuple[str, ...]:
        return UNKEPT

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        start = PolicySpec(system=self.params.instruction).policy(ctx, "alignment.guide.instruction").prompt
        ctx = replace(ctx, prompt=start)  # the policy of all candidates, and of the answers that calibrate
        steps = Steps(ctx, "tokens")
        beams = [Beam(steps.transcript.fork())]
        chosen: Candidate | None = None
        while steps.go_on(len(beams)):
            open_ = [beam for beam in beams if not beam.finished]
            found = await together(self._expand(ctx, beam, steps.count, i) for i, beam in enumerate(open_))
            likeliest = [] if steps.count else [found[0][0].piece]
            if steps.cut_short([tail for new in found for beam in new for tail in beam.tails], likeliest):
                break
            considered = [*(beam for beam in beams if beam.finished), *(new for each in found for new in each)]
            beams = await self._keep(ctx, considered)
            if all(beam.finished for beam in beams):
                beams = self._within(beams)
                whole = [beam.candidate for beam in beams if beam.candidate]
                if self.params.beams > 1:
                    chosen = await ctx.pick(whole, Origin("beams", log_prior=[beam.log_p for beam in beams]))
                else:
                    (chosen,) = whole  # as picked step by step
                beams = [beam for beam in beams if beam.candidate is chosen]
            for event in steps.catch_up(
                [beam.transcript for beam in beams], [new.candidate for new in considered if new.candidate], chosen
            ):
                yield event
        if chosen is None and steps.count:  # a limit: the best beam is the answer, a finished one before others
            best = next((beam for beam in beams if beam.finished), beams[0])
            if self.params.beams > 1:
                ctx.report.moved(-best.log_p)
            for event in steps.catch_up([best.transcript], [], best.candidate if best.finished else None):
                yield event
        async for event in steps.end():
            yield event

    async def _expand(self, ctx: Context, beam: Beam, step: int, row: int) -> list[Beam]:
        """The beam's successors, scored: its top-k tokens, each with a lookahead."""
        p, transcript = self.params, beam.transcript
        ahead = Lookahead(ctx.prompt, 0 if p.lookahead == 0 else 1, p.lookahead or None, None if p.sampled else 0.0)
        pieces = await top_tokens(ctx, transcript, p.top_k)
        known = successors(beam.tails)
        reused = [known.get(tuple(piece.token_ids), []) for piece in pieces]
        tails = await roll_forward(ctx, transcript, pieces, ahead, step, reused, f"beam {row}")
        candidates = await value(ctx, transcript, pieces, tails)
        return [
            Beam(transcript, beam.log_p + piece.logprobs[0].logprob, piece, candidate, tail)
            for piece, candidate, tail in zip(pieces, candidates, tails, strict=True)
        ]

    async def _keep(self, ctx: Context, considered: list[Beam]) -> list[Beam]:
        """The beams of the largest c = log P + lambda h."""
        p = self.params
        candidates = [beam.candidate for beam in considered if beam.candidate is not None]
        heuristic = ctx.rate(candidates)
        for i, (beam, candidate, h) in enumerate(zip(considered, candidates, heuristic, strict=True)):
            candidate.index, beam.h = i, h
            length = len(beam.transcript.token_ids) + len(beam.piece.token_ids)
            candidate.combined = beam.log_p / length**p.length_penalty + p.weight * h
        none_keeps = p.threshold is not None and max(heuristic) < p.threshold
        if none_keeps:
            ctx.report.warn("no candidate kept the threshold at some step, so the nearest to it went on there")
        pool = self._within(considered)
        if p.beams == 1:
            chosen = await ctx.pick(
                [beam.candidate for beam in pool if beam.candidate],
                Origin("tokens", log_prior=[beam.piece.logprobs[0].logprob for beam in pool]),
            )
            return [beam.kept() for beam in pool if beam.candidate is chosen]
        best = sorted(pool, key=_order)
        if none_keeps:
            best = sorted(considered, key=lambda beam: (-beam.h, _order(beam)))
        return [beam.kept() for beam in best[: p.beams]]

    def _within(self, beams: list[Beam]) -> list[Beam]:
        """Those that keep the threshold; where none does, those nearest to it."""
        if self.params.threshold is None:
            return beams
        least = min(self.params.threshold, max(beam.h for beam in beams))
        return [beam for beam in beams if beam.h >= least]


def _order(beam: Beam) -> tuple[float, float]:
    return beam.candidate.order if beam.candidate else (0.0, 0.0)
