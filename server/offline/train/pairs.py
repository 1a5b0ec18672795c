"""Preference pairs from JSON lines: reading, parsing, and errors that name the file's line.

No error and no report quotes a pair's text: preference data is often offensive.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guiderail.guides.core.errors import GuiderailError
from guiderail.guides.core.types import Message
from guiderail.server.offline.lines import DataError, check_fields, conversation, read_lines, text

ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


class TrainingError(GuiderailError):
    """A head cannot be trained from these arguments, pairs or base."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to the same messages, `chosen` preferred to `rejected` by their labeller.

    `line` counts from 1. The answers are stripped of surrounding whitespace, as chat templates expect.
    """

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    line: int

    @property
    def key(self) -> str:
        """Key that keeps pairs together: the conversation's first user message, or else all of its messages.

        It is coarser than the prompt, so that two prompts that continue one conversation also stay together.
        """
        opening = next((m.content for m in self.messages if m.role == "user"), None)
        return json.dumps([[m.role, m.content] for m in self.messages]) if opening is None else opening


@dataclass(frozen=True, slots=True)
class PairFile:
    """The usable pairs of a file, how many lines were left out and why, and the file's own SHA-256."""

    pairs: tuple[Pair, ...]
    skipped: dict[str, int]
    sha256: str


class _Unusable(Exception):
    """A well-formed line that holds no preference between two answers to one prompt."""


def read_pairs(path: Path) -> PairFile:
    """Read a .jsonl or .jsonl.gz file in one of two shapes, line by line:

    - `{"chosen": dialogue, "rejected": dialogue}` with turns marked "\\n\\nHuman:" and "\\n\\nAssistant:"
      (HH-RLHF, Bai et al. 2022); the turns that both share are the prompt;
    - `{"messages": [{"role", "content"}, ...], "chosen": answer, "rejected": answer}`.

    Lines whose dialogues diverge before the last answer, or whose answers are equal, are left out and
    counted. Raises DataError naming file and line for anything malformed.
    """
    skipped: dict[str, int] = {}

    def parse(row: dict[str, Any], number: int) -> Pair | None:
        try:
            return _pair(row, number)
        except _Unusable as reason:
            skipped[str(reason)] = skipped.get(str(reason), 0) + 1
            return None

    rows, digest = read_lines(path, parse)
    pairs = tuple(pair for pair in rows if pair is not None)
    if not pairs:
        raise DataError(f"{path}: no usable pairs")
    return PairFile(pairs, skipped, digest)


def parse_dialogue(text: str) -> tuple[Message, ...]:
    """Messages of an HH-RLHF dialogue. Raises ValueError if it does not begin with a turn's marker."""
    marks = list(_TURN.finditer(text))
    if not marks or marks[0].start() != 0:
        raise ValueError('not a dialogue: it must begin with "\\n\\nHuman:" or "\\n\\nAssistant:"')
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple(Message(ROLES[mark[1]], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True))


def _pair(row: dict[str, Any], number: int) -> Pair:
    check_fields(row, ("messages", "chosen", "rejected"))
    texts = [text(row, "chosen"), text(row, "rejected")]
    if "messages" in row:
        messages = conversation(row["messages"])
        chosen, rejected = (each.strip() for each in texts)
    else:
        messages, chosen, rejected = _from_dialogues(texts)
    if chosen == rejected:
        raise _Unusable("the answers are equal")
    return Pair(messages, chosen, rejected, number)


def _from_dialogues(texts: list[str]) -> tuple[tuple[Message, ...], str, str]:
    dialogues = []
    for field, dialogue in zip(("chosen", "rejected"), texts, strict=True):
        try:
            messages = parse_dialogue(dialogue)
        except ValueError as error:
            raise ValueError(f"'{field}' is {error}") from None
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise ValueError(f"'{field}' must hold a prompt and end with an Assistant turn")
        dialogues.append(messages)
    first, second = dialogues
    if first[:-1] != second[:-1]:
        raise _Unusable("the dialogues diverge before their last answer")
    return first[:-1], first[-1].content, second[-1].content
