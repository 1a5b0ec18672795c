"""Sampling: the policy as it is. The control arm of every comparison and the simplest guide.

Rewards named in the request are computed for the finished answer and reported; they change nothing.
"""

from collections.abc import AsyncGenerator
from typing import ClassVar

from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import DeadlinePassed
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import Candidate, Event, Final, Scored, Token, TokenLogprob


class Sampling(Guide):
    """Plain sampling from the policy, without steering; rewards are only reported."""

    streams: ClassVar[bool] = True
    steers: ClassVar[bool] = False
    keeps_format: ClassVar[bool] = True

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        ctx.report.moved(0.0)  # it is the policy's own answer
        text: list[str] = []
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        finish, stop_reason = "length", None
        async with ctx.generate([ctx.prompt], ctx.sampling, ctx.seeds(1)) as rollouts:
            async for delta in rollouts:
                text.append(delta.text)
                ids.extend(delta.token_ids)
                logprobs.extend(delta.logprobs or ())
                finish, stop_reason = delta.finish_reason or finish, delta.stop_reason
                if delta.text or delta.token_ids:
                    yield Token(delta.text, delta.token_ids, delta.logprobs)
        if finish == "deadline" and not ids:
            raise DeadlinePassed("the deadline passed before the first token")
        answer = Candidate(0, "".join(text), tuple(ids), finish, stop_reason, tuple(logprobs) or None)
        if ctx.rewards:
            await ctx.score([answer])
            ctx.rate([answer])
            yield Scored((answer,))
        stopped_by = None if answer.finished else finish
        yield Final(finish if answer.finished else "length", stop_reason, stopped_by, 0, (answer,))
