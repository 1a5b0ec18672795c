"""ARGS: picks each next token by its log-probability plus a weighted reward of the answer up to it.

Khanov et al., "ARGS: Alignment as Reward-Guided Search", arXiv 2402.01694, eq. 3:
  score(z) = log pi0(z | x, y_<t) + w r([x, y_<t, z])    for z in the top k of pi0
ARGS-greedy takes the argmax (select argmax, whatever the temperature); ARGS-stochastic samples softmax(score / tau)
(select softmax, where tau is its beta times the request's temperature).

The reward reads partial answers; one that was trained on whole answers is noisy there. Costs L tokens and k L
scores of one new token each.
"""

from collections.abc import AsyncGenerator
from typing import ClassVar

import numpy as np
from pydantic import Field

from guiderail.guides.core.context import Context
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import Event, Factor, Params
from guiderail.guides.scoring.kl import Origin, PoolKind
from guiderail.guides.search.lookahead import value
from guiderail.guides.search.stepwise import MAX_TOP_K, UNKEPT, Steps, top_tokens


class ArgsParams(Params):
    top_k: int = Field(default=10, ge=1, le=MAX_TOP_K, description="Tokens considered at each step.")
    w: Factor = Field(default=1.5, description="Weight of the reward against log-probabilities.")


class Args(Guide[ArgsParams]):
    """ARGS: adds a weighted reward of the partial answer to each next token's log-probability."""

    Params = ArgsParams

    streams: ClassVar[bool] = True

    def candidates(self) -> int:
        return self.params.top_k

    def pools(self) -> dict[PoolKind, int]:
        return {"tokens": self.candidates()}

    def rows(self) -> int:
        return 1

    def cost(self, max_tokens: int) -> int:
        return max_tokens

    def refuses(self) -> tuple[str, ...]:
        return UNKEPT

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        steps = Steps(ctx, "tokens")
        while steps.go_on(1):
            pieces = await top_tokens(ctx, steps.transcript, self.params.top_k)
            scores = await value(ctx, steps.transcript, pieces, [[]] * len(pieces))
            log_prior = [piece.logprobs[0].logprob for piece in pieces]
            scores = scores.with_combined(np.array(log_prior) + self.params.w * scores.combined)
            pick = await ctx.select(scores, Origin("tokens", log_prior=log_prior))
            for event in steps.commit(pieces[pick.row], pick):
                yield event
        async for event in steps.end():
            yield event
