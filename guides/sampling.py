"""Sampling: the policy as it is. The control arm of every comparison and the simplest guide.

Rewards named in the request are computed for the finished answer and reported; they change nothing.
"""

from collections.abc import AsyncGenerator
from typing import ClassVar

from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import DeadlinePassed
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import Event, Final, Scored, Token
from guiderail.guides.search.sequence import Piece


class Sampling(Guide):
    """Plain sampling from the policy, without steering; rewards are only reported."""

    streams: ClassVar[bool] = True
    steers: ClassVar[bool] = False
    keeps_format: ClassVar[bool] = True

    def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        ctx.report.moved(0.0)  # it is the policy's own answer
        return sampled(ctx)


async def sampled(ctx: Context) -> AsyncGenerator[Event, None]:
    """The events of one answer that the Context's policy writes."""
    piece = Piece()
    async with ctx.generate([ctx.prompt], ctx.sampling, ctx.seeds.stream(1)) as rollouts:
        async for delta in rollouts:
            piece.take(delta)
            if delta.text or delta.token_ids:
                yield Token(delta.text, delta.token_ids, delta.logprobs)
    if piece.finish_reason == "deadline" and not piece.token_ids:
        raise DeadlinePassed("the deadline passed before the first token")
    answer = piece.candidate(0)
    scores = await ctx.score([answer])
    if scores.raw:
        answer = scores.of(0, answer)
        yield Scored((answer,))
    stopped_by = None if answer.finished else answer.finish_reason
    yield Final(answer.finish_reason if answer.finished else "length", answer.stop_reason, stopped_by, 0, (answer,))
