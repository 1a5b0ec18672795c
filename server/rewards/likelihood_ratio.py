"""The implicit reward: log-likelihood ratio of the answer under two policies of the engine.

r(x, y) = sum_t [ log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t) ], the reward that DPO shows a policy
pair to stand for, up to beta and a constant of the prompt (Rafailov et al. 2023, arXiv 2305.18290, eq. 5).
The two policies may differ by LoRA adapter, by system message, or by both; the request's prompter puts either message.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from guiderail.guides.core import guide as base
from guiderail.guides.core.guide import ScoreResult
from guiderail.guides.core.reward import Reward, Services
from guiderail.guides.core.types import PROMPT, Message, ScoreGroup, TokenPrompt

DEFAULT_MESSAGE = "You are a helpful, polite and honest assistant. You answer clearly and never insult anyone."


class Implicit(Reward):
    """Log-likelihood ratio of the answer under two policies (adapters or system messages) of the engine."""

    class Params(base.Params):
        adapter: str | None = Field(default=None, description="LoRA adapter of the policy; default: served model.")
        system_message: str | None = Field(
            default=DEFAULT_MESSAGE, max_length=8192, description="System message of the policy; null: the request's."
        )
        reference_adapter: str | None = Field(default=None, description="LoRA adapter of the reference.")
        reference_system_message: str | None = Field(
            default=None, max_length=8192, description="System message of the reference; null: the request's."
        )
        per_token: bool = Field(default=False, description="Mean over the answer's tokens instead of their sum.")

    batched: ClassVar[bool] = False

    def __init__(self) -> None:
        self._services: Services | None = None

    async def start(self, services: Services) -> None:
        self._services = services

    def check(self, params: Any, services: Services) -> None:
        for field in ("adapter", "reference_adapter"):
            name = getattr(params, field)
            if name is not None and name not in services.adapters:
                known = ", ".join(sorted(services.adapters)) or "none"
                raise ValueError(f"'{field}': no LoRA adapter '{name}'; loaded: {known}")
        policy = (params.adapter, params.system_message)
        if policy == (params.reference_adapter, params.reference_system_message):
            raise ValueError("policy and reference are the same, so the ratio is always 0")

    async def score(self, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
        assert self._services is not None
        return [await self._score_group(self._services, group) for group in groups]

    async def _score_group(self, services: Services, group: ScoreGroup) -> ScoreResult:
        params = group.params
        policy = _prompt(services, group, params.system_message, params.adapter)
        reference = _prompt(services, group, params.reference_system_message, params.reference_adapter)
        answers = [a.token_ids or tuple(services.renderer.encode(a.text, plain=True)) for a in group.answers]
        present = [ids for ids in answers if ids]  # an empty answer has likelihood 1 under any policy
        rows = await services.engine.answer_logprobs(
            [policy] * len(present) + [reference] * len(present), [*present, *present]
        )
        ratios = iter(
            (sum(up) - sum(down)) / (len(up) if params.per_token else 1)
            for up, down in zip(rows[: len(present)], rows[len(present) :], strict=True)
        )
        values = tuple(next(ratios) if ids else 0.0 for ids in answers)
        context = len(policy.token_ids) + len(reference.token_ids)
        return ScoreResult(values, sum(context + 2 * len(ids) for ids in present))


def _prompt(services: Services, group: ScoreGroup, system_message: str | None, adapter: str | None) -> TokenPrompt:
    """The request's prompt under another system message (which replaces the request's own) and adapter."""
    if system_message is None:
        return TokenPrompt(group.prompt.token_ids, adapter or group.prompt.adapter)
    if group.messages[0].role == PROMPT:
        before = services.renderer.encode(system_message + "\n\n", add_special_tokens=True)
        text = services.renderer.encode(group.messages[0].content)
        return TokenPrompt((*before, *text), adapter or group.prompt.adapter)
    turns = [Message("system", system_message), *(m for m in group.messages if m.role != "system")]
    if group.render is not None:
        prompt = group.render(turns)
    else:
        goes_on = turns[-1].role == "assistant"
        prompt = services.renderer.render(turns, add_generation_prompt=not goes_on, continue_final_message=goes_on)
    return TokenPrompt(prompt.token_ids, adapter or group.prompt.adapter)
