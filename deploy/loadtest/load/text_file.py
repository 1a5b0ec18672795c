"""Text files of the user's, read alike: UTF-8 with or without a byte order mark, and lines that only "\\n" ends.

`str.splitlines` and text mode end a line at "\\r", U+2028, U+0085 and form feeds too, which JSON strings and prompts
may hold. A file without any "\\n" is taken to end its lines with "\\r".
"""

import json
from pathlib import Path

from guiderail.loadtest.loadtest_error import LoadtestError


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises LoadtestError, which begins with `what` the file is."""
    try:
        return path.expanduser().read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadtestError(f"{what} {path}: {error}") from error


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends."""
    return [line.removesuffix("\r") for line in text.split("\n" if "\n" in text else "\r")]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def parse_json(text: str) -> object:
    """The value of a JSON text; NaN and Infinity are none. Raises ValueError, also for what is nested too deep."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
