"""Controlled decoding, blockwise: the best of K continuations, block after block.

Mudgal et al., "Controlled Decoding from Language Models", arXiv 2310.17022, section 3.2: draw K i.i.d.
continuations of M tokens from the policy, keep the one of the largest value, repeat to the end of the answer.
The paper learns a value model V(s) = E_pi0[r | s]. Here the value of a block is the reward of the answer so far
(`rollouts` 0), or an estimate of that expectation from rollouts of the policy itself.

KL(guided || policy) <= E[ceil(L / M)] (log K - (K - 1) / K); with M >= L it is best-of-K. Costs K L tokens, K L / M
partial scores and L / M barriers; with rollouts of length h, K L (1 + R h / M) tokens.
"""

from collections.abc import AsyncGenerator
from typing import ClassVar

from pydantic import Field

from guiderail.guides.core.context import Context
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import Event, Params
from guiderail.guides.scoring.kl import Origin, PoolKind
from guiderail.guides.search.lookahead import Lookahead, roll_forward, value
from guiderail.guides.search.stepwise import UNKEPT_BY_BLOCKS, Steps, draw_blocks


class ControlledDecodingParams(Params):
    k: int = Field(default=8, ge=1, le=1024, description="Continuations drawn for each block.")
    block: int = Field(default=32, ge=1, description="Tokens of a block.")
    rollouts: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Rollouts of the policy whose mean is a block's value; 0: its own reward.",
    )
    horizon: int | None = Field(default=None, ge=1, description="Tokens of a rollout; null: to the answer's end.")


class ControlledDecoding(Guide[ControlledDecodingParams]):
    """Controlled decoding: keeps the best of k continuations, block by block."""

    Params = ControlledDecodingParams

    streams: ClassVar[bool] = True

    def candidates(self) -> int:
        return self.params.k * max(1, self.params.rollouts)

    def pools(self) -> dict[PoolKind, int]:
        return {"blocks": self.params.k}

    def cost(self, max_tokens: int) -> int:
        p = self.params
        steps, ahead = -(-max_tokens // p.block), min(p.horizon or max_tokens, max_tokens)
        return p.k * (max_tokens + steps * p.rollouts * ahead)

    def refuses(self) -> tuple[str, ...]:
        return UNKEPT_BY_BLOCKS

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        k, block = self.params.k, self.params.block
        ahead = Lookahead(ctx.prompt, self.params.rollouts, self.params.horizon)
        steps = Steps(ctx, "blocks")
        while steps.go_on(k):
            pieces = await draw_blocks(ctx, steps.transcript, k, block, steps.count)
            if steps.cut_short(pieces):
                break
            tails = await roll_forward(ctx, steps.transcript, pieces, ahead, steps.count)
            if steps.cut_short([tail for rows in tails for tail in rows], pieces):
                break
            scores = await value(ctx, steps.transcript, pieces, tails)  # V of each block
            pick = await ctx.select(scores, Origin("blocks", k))
            for event in steps.commit(pieces[pick.row], pick):
                yield event
        async for event in steps.end():
            yield event
