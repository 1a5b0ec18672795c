"""What a prompter is: messages in, one prompt out, and a filter for the text that comes back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from guiderail.guides.core.reward import Renderer, Services
from guiderail.guides.core.types import Message, TokenPrompt


def with_system(messages: Sequence[Message], *texts: str) -> tuple[Message, ...]:
    """The conversation with these texts, in their order, behind what its first system message says.

    All of it becomes one system message, the parts with an empty line between; a conversation that does not begin
    with one gets it. Empty texts are left out.
    """
    own = messages[0].content if messages and messages[0].role == "system" else None
    parts = [*([] if own is None else [own]), *(text for text in texts if text)]
    if len(parts) == (own is not None):
        return tuple(messages)
    return (Message("system", "\n\n".join(parts)), *messages[own is not None :])


class Cleaner:
    """Separates an answer from what the model writes around it, while it is being written. This one keeps all.

    One cleaner serves one answer. The pieces that `push` and `finish` return join to the same text however the
    input was cut into pieces.
    """

    def push(self, text: str) -> str:
        """Takes the next piece of output; returns the text that is now known to belong to the answer."""
        return text

    def finish(self) -> str:
        """Returns the rest of the answer, once there is no more output."""
        return ""

    def clean(self, text: str) -> str:
        """The answer in a whole output, for a cleaner that has taken nothing yet."""
        return self.push(text) + self.finish()


class Prompter(BaseModel, ABC):
    """A way of putting a conversation before the model. The docstring's first line is its public description.

    name: what requests call it. stops: stop strings to add to the request's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    stops: ClassVar[tuple[str, ...]] = ()

    @property
    def says(self) -> str:
        """What the request has it tell the model besides the conversation, as text: rewards read it too."""
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
        """Token ids of the prompt. Raises RequestError, naming the field, for a conversation it cannot put."""
        ...

    def dump(self) -> dict[str, Any]:
        """Name and parameters, as a request could send them."""
        return {"name": self.name, **self.model_dump(mode="json", exclude_none=True)}

    def check(self, services: Services) -> None:
        """Refuses parameters that are well-formed but cannot work here, by raising ValueError."""
        return

    def cleaner(self, continued: str = "") -> Cleaner:
        """A filter for one answer's text. `continued` is the beginning of the answer that the prompt ends with."""
        return Cleaner()
