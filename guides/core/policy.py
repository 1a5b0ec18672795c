"""Other policies that a guide uses beside the served one: a baseline to roll out, an expert to mix in.

They share the served weights where they can: another LoRA adapter, another prompt, or both. One that is only rolled
out may run on another server (`guiderail serve --policy`), with the same tokenizer.

A policy is told what the request's own is, and more: a `system` text stands in one system message behind the
conversation's own, and the request's prompter puts it before the model unless the policy names another. What a policy
is told the rewards of the answer read too (Dialogue.view).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer
from pydantic_core import PydanticCustomError

from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.errors import FieldError, GuideField, RequestError
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.types import PROMPT, NotNamed, Params, TokenPrompt, read_named
from guiderail.guides.prompters import PROMPTERS
from guiderail.guides.prompters.prompter import Cleaner, Prompter, with_system


def _prompter(spec: object) -> Prompter:
    if isinstance(spec, Prompter):
        return spec
    known = ", ".join(sorted(PROMPTERS))
    try:
        named = read_named(spec)
    except NotNamed as fault:
        raise _no_prompter(f"must be the name of a prompter; known: {known}", fault.is_object) from fault
    if named.name not in PROMPTERS:
        raise _no_prompter(f"no prompter '{named.name}'; known: {known}", not isinstance(spec, str))
    return PROMPTERS[named.name].model_validate(named.params)


def _no_prompter(message: str, is_object: bool) -> PydanticCustomError:
    """An error about a prompter's name, which an object has in a field of its own."""
    return PydanticCustomError("prompter", "{message}", {"message": message} | ({"param": "name"} if is_object else {}))


AnyPrompter = Annotated[Prompter, BeforeValidator(_prompter), PlainSerializer(lambda p: p.dump())]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy before one conversation: its prompt, and what its own prompter does with what it writes.

    told: what it is told besides the conversation. stops: stop strings beside the request's. cleaner: takes the answer
    so far and filters what the policy writes behind it; None where its prompter is the request's, whose cleaner reads
    every answer anyway.
    """

    prompt: TokenPrompt
    told: tuple[str, ...] = ()
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

    def policy(self, dialogue: Dialogue, where: str) -> Policy:
        """This policy before the conversation. Whoever uses what it writes has rewards read what it is told.

        Raises FieldError naming `where`, the guide's field that the spec is, for what a prompter cannot put before the
        model.
        """
        field, adapter = GuideField(where), dialogue.prompt.adapter
        if self.model is not None:
            adapter = None if self.model == dialogue.model_name else self.model
        if self.system is None and self.prompter is None:
            return Policy(TokenPrompt(dialogue.prompt.token_ids, adapter))
        if dialogue.messages[0].role == PROMPT:
            raise FieldError(field, ": a policy with another prompt needs a chat request")
        prompter = self.prompter or dialogue.prompter
        try:
            ids = dialogue.render(prompter, with_system(dialogue.messages, self.system or "")).token_ids
            plain = ids if self.system is None else dialogue.render(prompter, dialogue.messages).token_ids
        except RequestError as error:
            raise FieldError(field, f": prompter '{prompter.name}' cannot put it: {error}") from error
        if self.system is not None and ids == plain:
            raise FieldError(field, f": prompter '{prompter.name}' leaves system messages out with this model")
        told = (self.system or "", "" if self.prompter is None else self.prompter.says)
        if prompter == dialogue.prompter:
            return Policy(TokenPrompt(ids, adapter), told)
        return Policy(TokenPrompt(ids, adapter), told, prompter.stops, prompter.cleaner)
