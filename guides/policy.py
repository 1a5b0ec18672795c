"""Other policies that a guide uses beside the served one: a baseline to roll out, an expert to mix in.

They share the served weights where they can: another LoRA adapter, another prompt, or both. One that is only rolled
out may run on another server (`guiderail serve --policy`), with the same tokenizer.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from guiderail.guides.base import Params
from guiderail.guides.errors import RequestError
from guiderail.guides.prompters import PROMPTERS, Prompter, Template
from guiderail.guides.reward import Services
from guiderail.guides.types import PROMPT, Message, TokenPrompt


def _prompter(spec: Any) -> Prompter:
    if isinstance(spec, Prompter):
        return spec
    fields = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, dict) else {}
    name = fields.pop("name", None)
    if name not in PROMPTERS:
        raise ValueError(f"no prompter '{name}'; known: {', '.join(sorted(PROMPTERS))}")
    return PROMPTERS[name].model_validate(fields)


AnyPrompter = Annotated[Prompter, BeforeValidator(_prompter), PlainSerializer(lambda p: p.dump())]


class PolicySpec(Params):
    """A policy by what differs from the request's own."""

    model: str | None = Field(default=None, description="A served model, adapter or remote policy; default: as asked.")
    system: str | None = Field(default=None, description="A system message in place of the conversation's own.")
    prompter: AnyPrompter | None = Field(default=None, description="Another prompter, such as urial, with its fields.")

    def check(self, services: Services, *, rolled_out: bool = False) -> None:
        """Raises ValueError if there is no such policy here. `rolled_out`: the guide only continues text with it."""
        if self.model in services.remote and not rolled_out:
            raise ValueError(f"policy '{self.model}' is on another server: it can be a baseline, and not be mixed in")
        known = {services.model_name, *services.adapters, *(services.remote if rolled_out else ())}
        if self.model is not None and self.model not in known:
            raise ValueError(f"no policy '{self.model}'; known: {', '.join(sorted(known))}")
        if self.prompter is not None:
            self.prompter.check(services)

    def prompt(self, messages: Sequence[Message], prompt: TokenPrompt, services: Services) -> TokenPrompt:
        """The token prompt of this policy for a conversation whose own is `prompt`. Raises RequestError."""
        adapter = prompt.adapter
        if self.model is not None:
            adapter = None if self.model == services.model_name else self.model
        if self.system is None and self.prompter is None:
            return TokenPrompt(prompt.token_ids, adapter)
        if messages and messages[0].role == PROMPT:
            raise RequestError("a policy with another prompt needs a chat request", "alignment.guide")
        turns = list(messages)
        if self.system is not None:
            turns = [Message("system", self.system), *(m for m in messages if m.role != "system")]
        goes_on = turns[-1].role == "assistant"
        rendered = (self.prompter or Template()).render(
            turns, services.renderer, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
        return TokenPrompt(rendered.token_ids, adapter)
