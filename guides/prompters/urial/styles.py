"""Styles: an instruction and examples that show a base model how to answer. Three are shipped in examples/*.md.

A style file is a prompt in the layout itself (layout.py): `# Instruction`, then pairs of `# Query:` and `# Answer:`.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import Field

from guiderail.guides.core.types import Fields
from guiderail.guides.prompters.urial.layout import answer_block, instruction_block, parse, query_block

BUILT_IN = ("balanced", "helpful", "brief")
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class Example(Fields):
    """A question and its model answer."""

    query: Text
    answer: Text


class Style(Fields):
    """Instruction and examples that precede every conversation."""

    instruction: Text
    examples: tuple[Example, ...] = Field(min_length=1)

    @property
    def text(self) -> str:
        """The prompt up to the conversation."""
        turns = (query_block(each.query) + answer_block(each.answer) for each in self.examples)
        return instruction_block(self.instruction) + "".join(turns)


def parse_style(text: str) -> Style:
    """The style that a file's text describes. Raises ValueError (pydantic's for blank texts)."""
    instruction, pairs = parse(text)
    return Style(instruction=instruction, examples=tuple(Example(query=q, answer=a) for q, a in pairs))


def load_style(path: Path) -> Style:
    """Read a style file in UTF-8. Raises ValueError naming the file, OSError if it cannot be read."""
    try:
        return parse_style(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@cache
def built_in(name: str) -> Style:
    """One of the styles in BUILT_IN."""
    return parse_style(
        files("guiderail.guides.prompters.urial").joinpath(f"examples/{name}.md").read_text(encoding="utf-8")
    )
