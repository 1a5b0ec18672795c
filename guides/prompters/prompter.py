"""Prompters: messages in, one prompt out, and a filter for what comes back. The plainest is the chat template."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from guiderail.guides.core.interfaces import Renderer, Services
from guiderail.guides.core.types import Fields, Message, TokenPrompt


def with_system(messages: Sequence[Message], *texts: str) -> tuple[Message, ...]:
    """Return the conversation with these texts, in order, appended to its first system message.

    An empty line separates the parts. A conversation that does not begin with a system message gets one. Empty texts
    are left out.
    """
    own = messages[0].content if messages and messages[0].role == "system" else None
    parts = [*([] if own is None else [own]), *(text for text in texts if text)]
    if len(parts) == (own is not None):
        return tuple(messages)
    return (Message("system", "\n\n".join(parts)), *messages[own is not None :])


class Cleaner:
    """Filter that separates an answer from the text around it, as it is generated. This one keeps everything.

    One cleaner serves one answer. The pieces returned by `push` and `finish` join to the same text however the input
    was split.
    """

    def push(self, text: str) -> str:
        """Take the next piece of output; return the text now known to belong to the answer."""
        return text

    def finish(self) -> str:
        """Return the rest of the answer, once there is no more output."""
        return ""

    def clean(self, text: str) -> str:
        """Return the answer within a whole output; the cleaner must not have taken anything yet."""
        return self.push(text) + self.finish()


class Prompter(Fields, ABC):
    """A way to turn a conversation into a prompt. The docstring's first line is its public description.

    name: what requests call it. stops: stop strings to add to the request's own.
    """

    name: ClassVar[str]
    stops: ClassVar[tuple[str, ...]] = ()

    @property
    def says(self) -> str:
        """Text that the request adds to the conversation for the model; rewards read it too."""
        return ""

    @abstractmethod
    def render(
        self,
        messages: Sequence[Message],
        renderer: Renderer,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> TokenPrompt:
        """Return the prompt's token ids. Raises RequestError, naming the field, for a conversation it cannot render."""
        ...

    def dump(self) -> dict[str, object]:
        """Return name and parameters, as a request could send them."""
        return {"name": self.name, **self.model_dump(mode="json", exclude_none=True)}

    def check(self, services: Services) -> None:
        """Check parameters that are well-formed but may not work here. Raises ValueError."""
        return

    def cleaner(self, continued: str = "") -> Cleaner:
        """Return a filter for one answer. `continued` is the beginning of the answer with which the prompt ends."""
        return Cleaner()


class Template(Prompter):
    """The model's own chat template, unchanged."""

    name: ClassVar[str] = "template"

    def render(
        self,
        messages: Sequence[Message],
        renderer: Renderer,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> TokenPrompt:
        return renderer.render(
            messages, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
        )
