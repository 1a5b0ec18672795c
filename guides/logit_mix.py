"""Logit mixing: other policies' log-probabilities are added to the served policy's, token by token, in the engine.

  log pi(z | s) = log pi_0(z | s) + sum_i w_i log pi_i(z | s) + tilt(z) - log Z,   sampled at temperature T as pi^{1/T}

GenARM (Xu et al., arXiv 2410.08193, eq. 7) has autoregressive reward models as pi_i with w_i = 1 / beta_i; a negative
weight steers away from a policy (contrastive decoding, expert and anti-expert). Weights are not normalised, so the
temperature divides the whole sum once; dividing the weights as well would sharpen twice. `tilt` adds a value per token,
a sparse reward.

With a negative weight a token that both policies find absurd can win, because the other finds it more so. Therefore
tokens z with pi_0(z | s) < plausibility * max pi_0(. | s) are left out before anything is mixed (Li et al.,
"Contrastive Decoding", arXiv 2210.15097, eq. 3, where it is alpha = 0.1). All policies share the served vocabulary and
weights: adapters, or the model under another prompt.

Costs L tokens, and for each of them a forward pass of each mixed policy (`spend.mixed_tokens`); no scores.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import ClassVar

from pydantic import Field, StrictInt

from guiderail.guides.core import guide as base
from guiderail.guides.core.context import Context
from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.core.reward import Services
from guiderail.guides.core.types import Event, Mixed
from guiderail.guides.sampling import Sampling

PLAUSIBILITY = 0.1  # contrastive decoding's alpha
LARGEST_TILT = 100.0  # the engine's bound on a logit bias


class WeightedPolicy(PolicySpec):
    """A policy and the weight of its log-probabilities."""

    weight: float = Field(default=1.0, ge=-10, le=10, description="Negative: steer away from it.")


class TokenTilt(base.Params):
    """A value that is added to one token's log-probability."""

    token: StrictInt | str = Field(default="", description="The token's id, or a text that is one token.")
    value: float = Field(default=0.0, ge=-LARGEST_TILT, le=LARGEST_TILT)


class LogitMix(Sampling):
    """Logit mixing: adds weighted log-probabilities of other policies, and a tilt per token, inside the engine."""

    class Params(base.Params):
        plausibility: float | None = Field(
            default=None,
            ge=0,
            le=1,
            description="Least share of the policy's top probability; null: 0.1 with a negative weight, else 0.",
        )
        policies: tuple[WeightedPolicy, ...] = Field(default=(), max_length=4, description="Policies to mix in.")
        tilt: tuple[TokenTilt, ...] = Field(default=(), max_length=300, description="A sparse reward over tokens.")

    steers: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = False
    keeps_format: ClassVar[bool] = False

    def rows(self) -> int:
        return 1 + len(self.params.policies)

    def cost(self, max_tokens: int) -> int:
        return max_tokens * self.rows()

    def check(self, services: Services) -> None:
        if not self.params.policies and not self.params.tilt:
            raise ValueError("logit_mix needs 'policies' or a 'tilt'")
        for policy in self.params.policies:
            policy.check(services)
        self._tilts(services)

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        ctx.report.moved(None)  # the mixture's KL from the served policy is not known
        services = ctx.helpers.services
        mix = tuple(self._mixed(i, policy, ctx) for i, policy in enumerate(self.params.policies))
        bias = dict(ctx.sampling.logit_bias)
        for token, value in self._tilts(services).items():
            bias[token] = max(-LARGEST_TILT, min(LARGEST_TILT, bias.get(token, 0.0) + value))
        mixed = replace(
            ctx,
            prompt=replace(ctx.prompt, mix=mix, plausibility=self._floor),
            sampling=replace(ctx.sampling, logit_bias=bias),
        )
        async with aclosing(super().run(mixed)) as events:
            async for event in events:
                yield event

    @property
    def _floor(self) -> float:
        given = self.params.plausibility
        steers_away = any(policy.weight < 0 for policy in self.params.policies)
        return PLAUSIBILITY * steers_away if given is None else float(given)

    @staticmethod
    def _mixed(i: int, policy: WeightedPolicy, ctx: Context) -> Mixed:
        prompt = policy.policy(ctx, f"alignment.guide.policies[{i}]", away=policy.weight < 0).prompt
        return Mixed(prompt.token_ids, prompt.adapter, policy.weight)

    def _tilts(self, services: Services) -> dict[int, float]:
        """Values by token id. Raises ValueError for a text that is not one token."""
        values: dict[int, float] = {}
        for each in self.params.tilt:
            ids = [each.token] if isinstance(each.token, int) else services.renderer.encode(each.token, plain=True)
            if len(ids) != 1:
                raise ValueError(f"'tilt': {each.token!r} is {len(ids)} tokens of this model; name single ones, or ids")
            values[ids[0]] = values.get(ids[0], 0.0) + each.value
        return values
