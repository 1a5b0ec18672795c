"""Prompts from JSON lines, for the commands that draw answers from the served model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guiderail.guides.core.types import PROMPT, Message
from guiderail.server.offline.lines import DataError, check_fields, conversation, read_lines, text


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of a file, in order, and the file's SHA-256."""

    prompts: tuple[tuple[Message, ...], ...]
    sha256: str


def read_prompts(path: Path) -> PromptFile:
    """Read a .jsonl or .jsonl.gz file with one object per line, in one of two shapes:

    - `{"messages": [{"role", "content"}, ...]}`: a conversation that ends with the user's message;
    - `{"prompt": "..."}`: a text for the model to continue, without its chat template.

    Raises DataError naming file and line for anything else.
    """
    prompts, digest = read_lines(path, _prompt)
    if not prompts:
        raise DataError(f"{path}: no prompts")
    return PromptFile(tuple(prompts), digest)


def _prompt(row: dict[str, Any], number: int) -> tuple[Message, ...]:
    check_fields(row, ("messages", "prompt"))
    if ("messages" in row) == ("prompt" in row):
        raise ValueError("give 'messages' or 'prompt', and not both")
    if "messages" in row:
        return conversation(row["messages"])
    content = text(row, "prompt")
    if not content.strip():
        raise ValueError("'prompt' is empty")
    return (Message(PROMPT, content),)
