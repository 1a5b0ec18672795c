"""Limits on the size of clients' patterns and schemas: looked at in one pass, before anything is made of them."""

import re

MAX_PATTERN_CHARS = 4096
MAX_PATTERN_DEPTH = 50  # groups in groups
MAX_PATTERN_SIZE = 20_000  # characters and sets of characters, with {n,m} written out

MAX_SCHEMA_DEPTH = 64  # objects and lists in each other, as in vLLM
MAX_SCHEMA_VALUES = 10_000  # all that stands in it: objects, lists, texts, numbers
MAX_SCHEMA_CHARS = 200_000  # of all names and texts
MAX_SCHEMA_PATTERNS = 100

# A group's beginning or end, a count of repeats, or a thing that is repeated: a set of characters, or one character.
_PIECE = re.compile(
    r"(?P<group>[()])|\{(?P<count>\d+,?\d*|,\d+)\}|\[\^?\]?(?:\\.|[^\]\\])*\]?|\\.|.",
    re.DOTALL | re.ASCII,
)


def check_pattern_size(pattern: str) -> None:
    """Raise ValueError for a pattern that is too long, also with all its repeats written out, or nests too deeply."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(f"has {len(pattern)} characters; at most {MAX_PATTERN_CHARS} are allowed")
    sizes, last = [0], 0  # of each group that is open, and of what a count would repeat
    for piece in _PIECE.finditer(pattern):
        if piece["group"] == "(":
            sizes.append(0)
            if len(sizes) > MAX_PATTERN_DEPTH + 1:
                raise ValueError(f"has more than {MAX_PATTERN_DEPTH} groups in each other")
        elif piece["group"]:
            last = sizes.pop() if len(sizes) > 1 else 0
            sizes[-1] += last
        elif counts := piece["count"]:
            times = max(min(int(each[:9]), 10**8) if len(each) < 10 else 10**8 for each in counts.split(",") if each)
            sizes[-1] += last * (times - 1) if times else 0
            last *= times
        else:
            last = 1
            sizes[-1] += 1
        if max(sizes[-1], last) > MAX_PATTERN_SIZE:
            raise ValueError(f"is over {MAX_PATTERN_SIZE} characters long with its repeats written out")


def check_schema_size(schema: object) -> None:
    """Raise ValueError for a schema that nests too deeply, holds too much, or has a pattern of too large a size."""
    values, chars, patterns = 1, 0, 0
    left: list[tuple[object, int]] = [(schema, 1)]
    while left:
        value, depth = left.pop()
        if isinstance(value, dict | list):
            if depth > MAX_SCHEMA_DEPTH:
                raise ValueError(f"nests more than {MAX_SCHEMA_DEPTH} objects and lists in each other")
            values += len(value)
            if values > MAX_SCHEMA_VALUES:
                raise ValueError(f"holds more than {MAX_SCHEMA_VALUES} values (objects, lists, texts and numbers)")
            for pattern in patterns_of(value):
                patterns += 1
                _check_inner(pattern)
            texts = list(value) if isinstance(value, dict) else []
            left += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
        else:
            texts = [value]
        chars += sum(len(text) for text in texts if isinstance(text, str))
        if chars > MAX_SCHEMA_CHARS:
            raise ValueError(f"has more than {MAX_SCHEMA_CHARS} characters in its names and texts")
        if patterns > MAX_SCHEMA_PATTERNS:
            raise ValueError(f"has more than {MAX_SCHEMA_PATTERNS} patterns")


def patterns_of(value: dict[str, object] | list[object]) -> list[str]:
    """Return the patterns that stand in a schema itself, and not in those within it."""
    if isinstance(value, list):
        return []
    own, named = value.get("pattern"), value.get("patternProperties")
    return [*([own] if isinstance(own, str) else []), *(named if isinstance(named, dict) else [])]


def _check_inner(pattern: str) -> None:
    try:
        check_pattern_size(pattern)
    except ValueError as error:
        shown = pattern if len(pattern) <= 60 else f"{pattern[:60]}..."
        raise ValueError(f"has the pattern {shown!r}, which {error}") from error
