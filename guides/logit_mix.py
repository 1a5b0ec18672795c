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
from typing import Annotated, ClassVar

from pydantic import Field, StrictInt

from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import FieldError, GuideField, RequestError
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.interfaces import Renderer, Services
from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.core.types import Event, Mixed, Params
from guiderail.guides.sampling import sampled

PLAUSIBILITY = 0.1  # contrastive decoding's alpha
LARGEST_TILT = 100.0  # the engine's bound on a logit bias


class WeightedPolicy(PolicySpec):
    """A policy and the weight of its log-probabilities."""

    weight: float = Field(default=1.0, ge=-10, le=10, description="Negative: steer away from it.")


TokenId = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]


class TokenTilt(Params):
    """A value that is added to one token's log-probability."""

    token: TokenId | str = Field(default="", description="The token's id, or a text that is one token.")
    value: float = Field(default=0.0, ge=-LARGEST_TILT, le=LARGEST_TILT)


class LogitMixParams(Params):
    plausibility: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Least share of the policy's top probability; null: 0.1 with a negative weight, else 0.",
    )
    policies: tuple[WeightedPolicy, ...] = Field(default=(), max_length=4, description="Policies to mix in.")
    tilt: tuple[TokenTilt, ...] = Field(default=(), max_length=300, description="A sparse reward over tokens.")


class LogitMix(Guide[LogitMixParams]):
    """Logit mixing: adds weighted log-probabilities of other policies, and a tilt per token, inside the engine."""

    Params = LogitMixParams

    streams: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = False

    def rows(self) -> int:
        return 1 + len(self.params.policies)

    def cost(self, max_tokens: int) -> int:
        return max_tokens * self.rows()

    def refuses(self) -> tuple[str, ...]:
        return ("bad_words", "allowed_token_ids")  # of the served policy alone, before the others are mixed in

    def check(self, services: Services) -> None:
        if not self.params.policies and not self.params.tilt:
            raise ValueError("logit_mix needs 'policies' or a 'tilt'")
        for policy in self.params.policies:
            policy.check(services)
        self._tilts(services.renderer)

    def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        ctx.report.moved(None)  # the mixture's KL from the served policy is not known
        mix = []
        for i, spec in enumerate(self.params.policies):
            policy = spec.policy(ctx.dialogue, f"policies[{i}]")
            mix.append(Mixed(policy.prompt.token_ids, policy.prompt.adapter, spec.weight))
            if spec.weight >= 0:  # the answer is steered away from the others
                ctx = ctx.telling(policy.told)
        bias = dict(ctx.sampling.logit_bias)
        for token, value in self._tilts(ctx.dialogue.renderer).items():
            bias[token] = max(-LARGEST_TILT, min(LARGEST_TILT, bias.get(token, 0.0) + value))
        prompt = replace(ctx.prompt, mix=tuple(mix), plausibility=self._floor)
        return _tilted(sampled(ctx.with_policy(prompt, replace(ctx.sampling, logit_bias=bias))))

    @property
    def _floor(self) -> float:
        given = self.params.plausibility
        steers_away = any(policy.weight < 0 for policy in self.params.policies)
        return PLAUSIBILITY * steers_away if given is None else given

    def _tilts(self, renderer: Renderer) -> dict[int, float]:
        """Values by token id. Raises ValueError for a text that is not one token."""
        values: dict[int, float] = {}
        for each in self.params.tilt:
            ids = [each.token] if isinstance(each.token, int) else renderer.encode(each.token, plain=True)
            if len(ids) != 1:
                raise ValueError(f"'tilt': {each.token!r} is {len(ids)} tokens of this model; name single ones, or ids")
            values[ids[0]] = values.get(ids[0], 0.0) + each.value
        return values


async def _tilted(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """The events; where the engine refuses tokens, they are the tilt's, for the request's own were checked."""
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except RequestError as error:
        if error.param != "logit_bias":
            raise
        raise FieldError(GuideField("tilt"), f": {error}") from error
