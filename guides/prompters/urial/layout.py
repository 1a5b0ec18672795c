"""The text layout of URIAL (arXiv 2312.01552): blocks under headings, queries and answers between fences.

A prompt is a sequence of blocks; the instruction comes first, `(fence)` is three backticks:

    # Instruction

    instruction
                        <- each further block has an empty line before it
    # Query:
    (fence)
    query
    (fence)

    # Answer:
    (fence)
    answer
    (fence)

Only a heading at the very start of a line counts, and the texts cannot contain one: `escape` indents each of their
lines that looks like a heading by four spaces, which Markdown reads as literal text and Python still as a comment. A
query that contains fences gets a longer fence around it, so that its code is unchanged. Answers keep the short fence:
the model writes it itself, so that a later turn of the conversation finds the same tokens in the prefix cache.
"""

import re

QUERY, ANSWER, INSTRUCTION = "# Query:", "# Answer:", "# Instruction"
FENCE = "```"

_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SPACE = rf"[^\S{_BREAKS}]*"
_START = rf"(?:\A|(?<=[{_BREAKS}]))"
_LIKE_HEADING = rf"{_SPACE}#+{_SPACE}(?:query|answer|user|instruction)\b"
_TO_ESCAPE = re.compile(rf"{_START}(?={_LIKE_HEADING})", re.IGNORECASE)
_ESCAPED = re.compile(rf"{_START} {{4}}(?={_LIKE_HEADING})", re.IGNORECASE)
_HEADING_LINE = re.compile(rf"^({QUERY}|{ANSWER}|{INSTRUCTION})[ \t]*$", re.MULTILINE)
_FENCED = re.compile(r"\s*(`{3,})[ \t]*\n(.*)\n\1\s*", re.DOTALL)


def escape(text: str) -> str:
    """Indent each line that looks like a heading by four more spaces."""
    return _TO_ESCAPE.sub("    ", text)


def unescape(text: str) -> str:
    """Undo `escape`."""
    return _ESCAPED.sub("", text)


def instruction_block(text: str) -> str:
    """A paragraph of instructions, without the empty line before it."""
    return f"{INSTRUCTION}\n\n{escape(text)}\n"


def query_block(text: str) -> str:
    """A query, with the empty line before it."""
    longest = max(map(len, re.findall("`{3,}", text)), default=len(FENCE) - 1)
    fence = "`" * (longest + 1)
    return f"\n{QUERY}\n{fence}\n{escape(text)}\n{fence}\n"


def answer_block(text: str) -> str:
    """A complete answer, with the empty line before it."""
    return f"{open_answer(text)}\n{FENCE}\n"


def open_answer(beginning: str = "") -> str:
    """An answer for the model to write or to continue."""
    return f"\n{ANSWER}\n{FENCE}\n{escape(beginning)}"


def parse(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return instruction and (query, answer) pairs of a prompt file. Raises ValueError with the place and the fault."""
    before, *rest = _HEADING_LINE.split(text)
    headings, bodies = rest[::2], rest[1::2]
    if before.strip() or not headings or headings[0] != INSTRUCTION:
        raise ValueError(f"must begin with a line '{INSTRUCTION}'")
    instruction = unescape(bodies[0].strip())
    if not instruction:
        raise ValueError(f"there is no text under '{INSTRUCTION}'")
    wanted = [QUERY, ANSWER] * (len(headings) // 2)
    if not wanted or headings[1:] != wanted:
        raise ValueError(f"after the instruction must come pairs of '{QUERY}' and '{ANSWER}', at least one")
    texts = []
    for number, body in enumerate(bodies[1:]):
        block = _FENCED.fullmatch(body)
        if block is None:
            where = f"{headings[number + 1]} number {number // 2 + 1}"
            raise ValueError(
                f"{where}: the text must stand alone between two lines of the same three or more backticks"
            )
        texts.append(unescape(block[2]))
    return instruction, list(zip(texts[::2], texts[1::2], strict=True))
