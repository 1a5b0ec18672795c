"""Quotes a text inside a judge's prompt so that nothing in it can look like a part of the prompt.

Each line begins with "> ", and what could be a special token of some tokenizer is broken up.
"""

import re

# <|im_end|>, </s>, <start_of_turn>, [INST], [CLS]: a space after the bracket makes ordinary text of them.
_SPECIAL = re.compile(r"(?<=<)(?=[^\s<>]+>)|(?<=\[)(?=/?[A-Z_]+\])")


def quoted(text: str) -> str:
    """The text as a quote, line by line."""
    return "\n".join("> " + _SPECIAL.sub(" ", line) for line in text.splitlines() or [""])
