"""JSON lines, plain or gzipped, read with errors that name file and line and quote no text."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from guiderail.guides.core.errors import GuiderailError
from guiderail.guides.core.types import Message
from guiderail.server.strict_json import JsonFault, read_body

T = TypeVar("T")


class DataError(GuiderailError):
    """A data file cannot be read, or one of its lines is malformed."""


def read_lines(path: Path, parse: Callable[[dict[str, Any], int], T]) -> tuple[list[T], str]:
    """Return the results of `parse(object, line number from 1)` for every non-blank line, and the file's SHA-256.

    Raises DataError with file and line if a line is not a JSON object or `parse` raises ValueError.
    """
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    lines = data.split(b"\n" if b"\n" in data else b"\r")  # what else ends lines may stand in JSON strings
    parsed = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            parsed.append(parse(_object(line), number))
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    return parsed, hashlib.sha256(raw).hexdigest()


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = read_body(line)
    except JsonFault as fault:
        if isinstance(fault.__cause__, json.JSONDecodeError):
            raise ValueError(f"not JSON at column {fault.__cause__.colno}") from None
        field = f"'{fault.path}' " if fault.path else "it "
        raise ValueError(f"not JSON that can be used: {field}{fault}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def check_fields(row: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise ValueError for an unknown field."""
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise ValueError(f"unknown field '{unknown[0]}'; there are: {', '.join(known)}")


def text(row: dict[str, Any], field: str) -> str:
    """A field that must be a string. Raises ValueError."""
    if not isinstance(row.get(field), str):
        raise ValueError(f"'{field}' must be a string" if field in row else f"'{field}' is missing")
    value: str = row[field]
    return value


def conversation(value: object) -> tuple[Message, ...]:
    """Messages that await an answer: a list of {"role", "content"} that ends with the user's. Raises ValueError."""
    if not isinstance(value, list) or not value:
        raise ValueError("'messages' must be a list of at least one message")
    for index, item in enumerate(value):
        fine = isinstance(item, dict) and set(item) == {"role", "content"} and isinstance(item["content"], str)
        if not fine or item["role"] not in ("system", "user", "assistant"):
            raise ValueError(
                f"'messages[{index}]' must be {{'role', 'content'}} with role system, user or assistant and a text"
            )
    if value[-1]["role"] != "user":
        raise ValueError("'messages' must end with the user's message, the one to answer")
    return tuple(Message(item["role"], item["content"]) for item in value)
