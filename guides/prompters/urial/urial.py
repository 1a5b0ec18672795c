"""URIAL: a base model answers like an assistant because its prompt shows it how (arXiv 2312.01552).

The prompt is a style's instruction and examples, then the conversation in the same layout (layout.py); it ends after
the fence that opens the answer. The part shared by all requests of a style comes first and stays in the engine's
prefix cache. System messages become further `# Instruction` blocks at their place in the conversation. The paper
samples with temperature 0.3 and repetition_penalty 1.1, which are fields of the request itself.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field, field_validator

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.interfaces import Renderer
from guiderail.guides.core.types import Message, TokenPrompt
from guiderail.guides.prompters.prompter import Cleaner, Prompter
from guiderail.guides.prompters.urial import layout
from guiderail.guides.prompters.urial.fenced import STOPS, FencedCleaner
from guiderail.guides.prompters.urial.styles import BUILT_IN, Example, Style, Text, built_in


class Urial(Prompter):
    """Instruction and examples in context (URIAL), for base models."""

    name: ClassVar[str] = "urial"
    stops: ClassVar[tuple[str, ...]] = STOPS
    files: ClassVar[Mapping[str, Style]] = {}

    style: str = Field(BUILT_IN[0], description="Instruction and examples to begin with, by name.")
    instruction: Text | None = Field(None, description="Replaces the style's instruction.")
    examples: tuple[Example, ...] | None = Field(
        None, min_length=1, max_length=32, description="Replaces the style's examples."
    )

    @field_validator("style")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in BUILT_IN and name not in cls.files:
            raise ValueError(f"no style '{name}'; known: {', '.join([*BUILT_IN, *sorted(cls.files)])}")
        return name

    @property
    def prefix_text(self) -> str:
        """The text with which every prompt of these parameters begins, byte for byte."""
        style = self.files[self.style] if self.style in self.files else built_in(self.style)
        return Style(instruction=self.instruction or style.instruction, examples=self.examples or style.examples).text

    @property
    def says(self) -> str:
        """The request's own instruction and examples; those of a style are the operator's."""
        own = [] if self.instruction is None else [self.instruction]
        turns = ("".join((layout.query_block(e.query), layout.answer_block(e.answer))) for e in self.examples or ())
        return "\n\n".join([*own, *(turn.strip() for turn in turns)])

    def text(self, messages: Sequence[Message], *, continue_final_message: bool = False) -> str:
        """Return the prompt as text. Raises RequestError for a conversation that leaves no answer to write."""
        for place, message in enumerate(messages):
            if message.role not in ("system", "user", "assistant"):
                raise RequestError(f"prompter 'urial' knows no role '{message.role}'", f"messages[{place}].role")
        if continue_final_message:
            if not messages or messages[-1].role != "assistant":
                raise RequestError("continue_final_message needs a last message of the assistant", "messages")
            *messages, last = messages
            end = layout.open_answer(last.content)
        else:
            if [m.role for m in messages if m.role != "system"][-1:] != ["user"]:
                raise RequestError("prompter 'urial' answers the user: the last message must be the user's", "messages")
            end = layout.open_answer()
        return self.prefix_text + "".join(map(_block, messages)) + end

    def render(
        self,
        messages: Sequence[Message],
        renderer: Renderer,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> TokenPrompt:
        if not (add_generation_prompt or continue_final_message):
            raise RequestError("prompter 'urial' always opens the answer", "add_generation_prompt")
        text = self.text(messages, continue_final_message=continue_final_message)
        return TokenPrompt(tuple(renderer.encode(text, add_special_tokens=True, plain=True)))

    def cleaner(self, continued: str = "") -> Cleaner:
        return FencedCleaner(continued)


def urial_with(styles: Mapping[str, Style]) -> type[Urial]:
    """Return Urial with the operator's styles added; one with a built-in's name replaces it."""

    class Extended(Urial):
        __doc__ = Urial.__doc__
        files: ClassVar[Mapping[str, Style]] = dict(styles)

    return Extended


def _block(message: Message) -> str:
    match message.role:
        case "system":
            return "\n" + layout.instruction_block(message.content)
        case "user":
            return layout.query_block(message.content)
        case _:
            return layout.answer_block(message.content)
