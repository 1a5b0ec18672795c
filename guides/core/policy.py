"""Other policies that a guide uses beside the served one: a baseline to roll out, an expert to mix in.

They share the served weights where they can: another LoRA adapter, another prompt, or both. One that is only rolled
out may run on another server (`guiderail serve --policy`), with the same tokenizer.

A policy is told what the request's own is, and more: a `system` text stands in one system message behind the
conversation's own, and the request's prompter puts it before the model unless the policy names another. What a policy
is told the rewards of the answer read too (Context.view).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field, PlainSerializer

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.guide import Params
from guiderail.guides.core.named import read_named
from guiderail.guides.core.reward import Services
from guiderail.guides.core.types import PROMPT, TokenPrompt
from guiderail.guides.prompters import PROMPTERS, Cleaner, Prompter, with_system

if TYPE_CHECKING:
    from guiderail.guides.core.context import Context


def _prompter(spec: object) -> Prompter:
    if isinstance(spec, Prompter):
        return spec
    named = read_named(spec)
    if named.name not in PROMPTERS:
        raise ValueError(f"no prompter '{named.name}'; known: {', '.join(sorted(PROMPTERS))}")
    return PROMPTERS[named.name].model_validate(named.params)


AnyPrompter = Annotated[Prompter, BeforeValidator(_prompter), PlainSerializer(lambda p: p.dump())]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy before one conversation: its prompt, and what its own prompter does with what it writes.

    stops: stop strings beside the request's. cleaner: takes the answer so far and filters what the policy writes
    behind it; None where its prompter is the request's, whose cleaner reads every answer anyway.
    """

    prompt: TokenPrompt
    stops: tuple[str, ...] = ()
    cleaner: Callable[[str], Cleaner] | None = None


class PolicySpec(Params):
    """A policy by what differs from the request's own."""

    model: str | None = Field(default=None, description="A served model, adapter or remote policy; default: as asked.")
    system: str | None = Field(
        default=None, min_length=1, description="A further system text, behind the conversation's own."
    )
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

    def policy(self, ctx: "Context", where: str, *, away: bool = False) -> Policy:
        """This policy before the Context's conversation. What it is told rewards will read, unless `away` from it.

        Raises RequestError naming `where`, the field of the spec, for what a prompter cannot put before the model.
        """
        services, adapter = ctx.helpers.services, ctx.prompt.adapter
        if self.model is not None:
            adapter = None if self.model == services.model_name else self.model
        if self.system is None and self.prompter is None:
            return Policy(TokenPrompt(ctx.prompt.token_ids, adapter))
        if ctx.messages[0].role == PROMPT:
            raise RequestError(f"'{where}': a policy with another prompt needs a chat request", where)
        prompter = self.prompter or ctx.prompter
        try:
            ids = ctx.render(prompter, with_system(ctx.messages, self.system or "")).token_ids
            plain = ids if self.system is None else ctx.render(prompter, ctx.messages).token_ids
        except RequestError as error:
            raise RequestError(f"'{where}': prompter '{prompter.name}' cannot put it: {error}", where) from error
        if self.system is not None and ids == plain:
            raise RequestError(
                f"'{where}': prompter '{prompter.name}' leaves system messages out with this model", where
            )
        if not away:
            ctx.tell(self.system or "", self.prompter.says if self.prompter is not None else "")
        if prompter == ctx.prompter:
            return Policy(TokenPrompt(ids, adapter))
        return Policy(TokenPrompt(ids, adapter), prompter.stops, prompter.cleaner)
