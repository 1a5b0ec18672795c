"""Transfer Q*: decodes towards a target reward with rollouts of an aligned baseline policy.

Chakraborty et al., "Transfer Q*: Principled Decoding for LLM Alignment", arXiv 2405.20495.

The optimal token policy is pi*(z | s) ~ pi0(z | s) exp(Q*(s, z) / alpha). Q* is unknown; it is estimated with a
baseline rho that is already aligned to some reward:
  direct    (rho is aligned to the target r):   TQ(s, z) = E_{tau ~ rho(. | s, z)}[r]
  indirect  (rho is aligned to another r_BL):   TQ(s, z) = E_rho[w r] / E_rho[w],  w = exp((r - r_BL) / beta)
With rho = pi0 it is controlled decoding: Q under the policy itself.

block 1: z runs over the top_k tokens of pi0, and the score is log pi0(z | s) + TQ / alpha.
block M: z runs over top_k continuations of M tokens drawn from pi0, so pi0 is in the draw and the score is TQ / alpha.
Selection by argmax is the paper's; softmax with beta 1 samples from the policy above as far
as the candidates and the estimates go: without the tokens beyond top_k, or from the k blocks that were drawn, and by
exp of an estimate, whose mean is not exp of the mean (Jensen). The request's temperature divides the whole score.
Indirect transfer weighs whole answers; on rollouts that `lookahead` cuts, r and r_BL are of beginnings, and the
weights are a heuristic: the theorem's need `lookahead` null.
Reused rollouts (`reuse`) helped their candidate to be chosen, so few of them value the path taken a little too high.

Costs per token 1 + k l tokens (k candidates, l of lookahead, R rollouts each: 1 + k R l) and k R scores.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import AlignmentField, FieldError, GuideField
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.core.types import MAX_TEMPERATURE, Divisor, Event, Params
from guiderail.guides.scoring.kl import Origin, PoolKind
from guiderail.guides.scoring.scores import Scores
from guiderail.guides.search.lookahead import Lookahead, Weigh, roll_forward, successors, value
from guiderail.guides.search.sequence import Piece
from guiderail.guides.search.stepwise import MAX_TOP_K, UNKEPT, UNKEPT_BY_BLOCKS, Steps, draw_blocks, top_tokens


class TransferQParams(Params):
    top_k: int = Field(default=10, ge=1, le=MAX_TOP_K, description="Candidates of a step.")
    block: int = Field(default=1, ge=1, description="Tokens of a step; 1 enumerates tokens, more draws blocks.")
    lookahead: int | None = Field(default=20, ge=1, description="Tokens of a rollout; null: to the answer's end.")
    rollouts: int = Field(default=1, ge=1, le=64, description="Rollouts for each candidate.")
    temperature: float | None = Field(
        default=None, ge=0, le=MAX_TEMPERATURE, description="Of the rollouts; null: the request's."
    )
    alpha: Divisor = Field(default=1.0, description="Weight of the KL from the policy: larger stays closer.")
    baseline: PolicySpec = Field(default=PolicySpec(), description="The aligned policy; default: the served one.")
    baseline_reward: str | None = Field(
        default=None,
        description="Label of the reward (of weight 0) the baseline is aligned to: indirect.",
    )
    beta: Divisor = Field(default=1.0, description="KL weight at which the baseline was aligned (indirect).")
    min_ess: float = Field(
        default=0.3, ge=0, le=1, description="Least share of effective rollouts; below it weights are not used."
    )
    reuse: bool = Field(default=True, description="Whether the chosen candidate's rollouts serve the next step.")


class TransferQ(Guide[TransferQParams]):
    """Transfer Q*: weighs each next token or block by the expected reward of an aligned baseline's rollouts."""

    Params = TransferQParams

    streams: ClassVar[bool] = True

    def candidates(self) -> int:
        return self.params.top_k * self.params.rollouts

    def pools(self) -> dict[PoolKind, int]:
        return {"tokens" if self.params.block == 1 else "blocks": self.params.top_k}

    def cost(self, max_tokens: int) -> int:
        p = self.params
        steps, ahead = -(-max_tokens // p.block), min(p.lookahead or max_tokens, max_tokens)
        drawn = max_tokens if p.block == 1 else p.top_k * max_tokens
        return drawn + steps * p.top_k * p.rollouts * ahead

    def refuses(self) -> tuple[str, ...]:
        if self.params.block == 1:
            return UNKEPT
        return UNKEPT_BY_BLOCKS

    def check(self, services: Services) -> None:
        self.params.baseline.check(services, rolled_out=True)
        if self.params.baseline_reward is not None and self.params.rollouts < 2:
            raise ValueError("indirect transfer (baseline_reward) weighs a candidate's rollouts: it needs at least 2")

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        p = self.params
        baseline = p.baseline.policy(ctx.dialogue, "baseline")
        ctx = ctx.telling(baseline.told)
        rho = Lookahead(baseline.prompt, p.rollouts, p.lookahead, p.temperature, baseline.stops, baseline.cleaner)
        weigh = self._indirect(ctx) if p.baseline_reward is not None else None
        steps = Steps(ctx, "tokens" if p.block == 1 else "blocks")
        known: dict[tuple[int, ...], list[Piece]] = {}
        while steps.go_on(p.top_k + 1):
            if p.block == 1:
                pieces = await top_tokens(ctx, steps.transcript, p.top_k)
            else:
                pieces = await draw_blocks(ctx, steps.transcript, p.top_k, p.block, steps.count)
            if steps.cut_short(pieces):
                break
            reused = [known.get(tuple(piece.token_ids), []) for piece in pieces] if p.block == 1 else None
            tails = await roll_forward(ctx, steps.transcript, pieces, rho, steps.count, known=reused)
            if steps.cut_short([tail for rows in tails for tail in rows], pieces[:1] if p.block == 1 else pieces):
                break
            scores = await value(ctx, steps.transcript, pieces, tails, weigh, rho)
            combined = scores.combined / p.alpha  # TQ / alpha
            if p.block == 1:
                log_prior = [piece.logprobs[0].logprob for piece in pieces]
                combined = combined + np.array(log_prior)  # + log pi0(z | s)
                origin = Origin("tokens", log_prior=log_prior)
            else:
                origin = Origin("blocks", p.top_k)
            pick = await ctx.select(scores.with_combined(combined), origin)
            known = successors(tails[pick.row]) if p.reuse else {}
            for event in steps.commit(pieces[pick.row], pick):
                yield event
        async for event in steps.end():
            yield event

    def _indirect(self, ctx: Context) -> Weigh:
        """Weights w = exp((r - r_BL) / beta) of a candidate's rollouts; equal ones where they collapse."""
        p = self.params
        term = next((t for t in ctx.pipeline.asked.rewards if t.label == p.baseline_reward), None)
        if term is None or term.weight != 0:
            raise FieldError(
                GuideField("baseline_reward"),
                " must be the label of a reward of weight 0 in ",
                AlignmentField("rewards"),
            )

        def weigh(rollouts: Scores) -> Sequence[float]:
            exponents = (rollouts.combined - rollouts.transformed[term.label]) / p.beta
            w = np.exp(exponents - exponents.max())
            share = float(w.sum() ** 2 / (w**2).sum() / len(w))
            ctx.report.least("transfer_ess", share * len(w))
            if len(w) > 1 and share < p.min_ess:
                ctx.report.warn(
                    f"indirect transfer: the weights of a candidate's {len(w)} rollouts collapsed onto "
                    f"{share * len(w):.1f} of them, so they were weighted equally (direct transfer) there"
                )
                return [1.0] * len(w)
            return [float(each) for each in w]

        return weigh
