"""Preferences of one request as a structured system message in the model's chat template.

Layout of the message (the part of a role only where one is given):

    # Role
    a patient teacher

    # Preferences
    Every answer follows these preferences. Where two of them conflict, the one further up decides.
    1. Use short sentences.
    2. Give an example for each claim.

If the conversation begins with a system message, that text comes first, unchanged, with a blank line after it;
otherwise this message becomes the first.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from guiderail.guides.core.interfaces import Renderer, Services
from guiderail.guides.core.types import Message, TokenPrompt
from guiderail.guides.prompters.prompter import Prompter, with_system

RULE = "Every answer follows these preferences. Where two of them conflict, the one further up decides."


def _one_line(text: str) -> str:
    """Collapse white space to single spaces, so that a statement cannot add headings or items. Raises ValueError."""
    folded = " ".join(text.split())
    if not folded:
        raise ValueError("must not be blank")
    return folded


Line = Annotated[str, Field(max_length=2000), AfterValidator(_one_line)]


class SystemMessage(Prompter):
    """The model's chat template, with preferences of this request in the system message."""

    name: ClassVar[str] = "system_message"

    preferences: tuple[Line, ...] = Field(
        min_length=1, max_length=20, description="Statements that answers follow, the most important first."
    )
    role: Line | None = Field(None, description="Who the assistant is.")

    def check(self, services: Services) -> None:
        if not services.renderer.has_chat_template:
            raise ValueError("this model has no chat template to put a system message in; for base models use 'urial'")

    @property
    def text(self) -> str:
        """The system message by itself."""
        items = "\n".join(f"{number}. {line}" for number, line in enumerate(self.preferences, 1))
        role = "" if self.role is None else f"# Role\n{self.role}\n\n"
        return f"{role}# Preferences\n{RULE}\n{items}"

    @property
    def says(self) -> str:
        return self.text

    def render(
        self,
        messages: Sequence[Message],
        renderer: Renderer,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> TokenPrompt:
        return renderer.render(
            with_system(messages, self.text),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
