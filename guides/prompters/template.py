"""The prompter that uses the model's own chat template."""

from collections.abc import Sequence
from typing import ClassVar

from guiderail.guides.core.interfaces import Renderer
from guiderail.guides.core.types import Message, TokenPrompt
from guiderail.guides.prompters.prompter import Prompter


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
