"""Best-of-N: draw N answers from the policy, score them, return the one the selection rule picks.

With argmax and a continuous reward the answer's distribution has the density N * u^(N-1) in the reward's quantile u, at
KL(policy || base) <= log N - (N-1)/N (Beirami et al. 2024, arXiv 2401.01879). Costs N answers of
generation and N scores per reward. Candidates are scored as they finish, not after the last.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar, overload

from pydantic import Field

from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import DeadlinePassed
from guiderail.guides.core.guide import Guide, answer_events
from guiderail.guides.core.seeds import POOL_SIZE
from guiderail.guides.core.tasks import task_group
from guiderail.guides.core.types import Candidate, Event, Params, Scored
from guiderail.guides.scoring.kl import Origin, PoolKind
from guiderail.guides.scoring.scores import Scores
from guiderail.guides.search.sequence import Piece, roll_out


class BestOfNParams(Params):
    n: int = Field(default=16, ge=1, le=4096, description="Number of candidate answers drawn from the policy.")


class BestOfN(Guide[BestOfNParams]):
    """Best-of-N: draws n answers, scores them all and returns the selected one."""

    Params = BestOfNParams

    keeps_format: ClassVar[bool] = True

    def candidates(self) -> int:
        return self.params.n

    def pools(self) -> dict[PoolKind, int]:
        return {"answers": self.params.n}

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        n = self.params.n
        (seed,) = ctx.seeds.stream(1, POOL_SIZE)
        drawn = await draw_scored(ctx, ctx.pipeline.asked.selection.draws(n, seed))
        stopped_by = next((c.finish_reason for c in drawn if not c.finished), None)
        scores = drawn.scores
        if scores is None:  # nothing was finished and scored in time: what there is has to do
            pool = [c for c in drawn if c.finished] or [c for c in drawn if c.token_ids]
            if not pool:
                raise DeadlinePassed("the deadline passed before any candidate had a token")
            scores = await ctx.score(pool)
        pick = await ctx.select(scores, Origin("answers", len(drawn), n))
        everything = in_place(drawn, pick.candidates)
        yield Scored(everything)
        for event in answer_events(pick.chosen, everything, stopped_by):
            yield event


@dataclass(frozen=True, slots=True)
class Drawn(Sequence[Candidate]):
    """Answers that were drawn, in order; those that were scored with their scores.

    scores: of those that were finished and scored, as a group; None if none was.
    """

    candidates: tuple[Candidate, ...]
    scores: Scores | None

    @overload
    def __getitem__(self, index: int) -> Candidate: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Candidate]: ...

    def __getitem__(self, index: int | slice) -> Candidate | Sequence[Candidate]:
        return self.candidates[index]

    def __len__(self) -> int:
        return len(self.candidates)


async def draw_scored(ctx: Context, n: int) -> Drawn:
    """Draw n answers and score each finished one as soon as it is there.

    Answers cut off by deadline or budget come back unscored, as do those whose score the deadline overtook.
    """
    drawn: dict[int, Candidate] = {}
    scored: dict[int, Scores] = {}
    async with task_group() as scoring:

        async def score(index: int, answer: Candidate) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(ctx.engine.remaining()):
                    scored[index] = await ctx.score([answer])

        def finished(index: int, piece: Piece) -> None:
            answer = drawn[index] = piece.candidate(index)
            if answer.finished:
                scoring.create_task(score(index, answer))

        sampling = replace(ctx.sampling, stream=False)
        await roll_out(ctx, [ctx.prompt] * n, sampling, ctx.seeds.stream(n), finished)
    answers = tuple([drawn[index] for index in range(n)])
    tables = [scored[index] for index in sorted(scored) if scored[index].raw]
    if not tables:
        return Drawn(answers, None)
    scores = Scores.join(tables)
    return Drawn(in_place(answers, scores.candidates), scores)


def in_place(candidates: Iterable[Candidate], scored: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """The candidates, with those of `scored` in the places of the same numbers."""
    known = {candidate.index: candidate for candidate in scored}
    return tuple(known.get(candidate.index, candidate) for candidate in candidates)
