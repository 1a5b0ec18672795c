"""JSON that others wrote, read strictly: what RFC 8259 does not know is refused, and so is what hurts further on.

Python's own reader takes NaN, Infinity, halves of surrogate pairs and names given twice, makes infinities of large
numbers, and fails with a RecursionError, sooner or later by how deep its caller stands. What clients send is read here.
"""

import json
import math
from collections.abc import Iterator

MAX_DEPTH = 100  # arrays and objects within each other
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1  # integers that engines and other languages have room for
_SHOWN = 60  # characters of a name in a message
_Container = dict[str, object] | list[object]
_Trail = tuple["_Trail", str | int] | None  # where a value stands: the trail of its container, and its key there


class JsonFault(ValueError):
    """What is wrong with a JSON text. path: of the field at fault, such as messages[0].content; "" if there is none."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class _Repeating(dict[str, object]):
    """An object that gives a name more than once."""


def read_body(data: bytes | bytearray) -> object:
    """Return the value of a JSON body. An integer beyond 64 bits becomes a float, as where there are no others.

    Raises JsonFault for what is no JSON in UTF-8 (a byte order mark may come first) or nests deeper than MAX_DEPTH, for
    a name that an object gives twice, a number beyond a float, and text with half of a surrogate pair.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonFault(f"is not UTF-8 at byte {error.start}") from error
    root: list[object] = [_parsed(text)]  # NaN is named by its path below, as all that is not finite
    for container, trail in _containers(root):
        if isinstance(container, dict):
            for name in container:
                _check_text(name, trail, "has a name with")
            if isinstance(container, _Repeating):
                raise JsonFault("gives a name twice", _path(trail))
        for key, item in _items(container):
            if isinstance(item, str):
                _check_text(item, (trail, key), "has")
            elif isinstance(item, int | float) and not _SMALLEST <= item <= _LARGEST:
                try:
                    number = float(item)
                except OverflowError:
                    number = math.inf
                if not math.isfinite(number):
                    raise JsonFault("is not a finite number, or beyond a float", _path((trail, key)))
                _put(container, key, number)
    return root[0]


def _parsed(text: str) -> object:
    try:
        try:
            return json.loads(text, object_pairs_hook=_object, parse_constant=float)
        except (json.JSONDecodeError, JsonFault):
            raise
        except ValueError:  # some integer has more digits than Python converts
            return json.loads(text, object_pairs_hook=_object, parse_constant=float, parse_int=float)
    except json.JSONDecodeError as error:
        raise JsonFault(f"is not valid JSON: {error}") from error
    except RecursionError as error:
        raise JsonFault(f"nests deeper than {MAX_DEPTH} levels") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeating(found)


def _containers(root: list[object]) -> Iterator[tuple[_Container, _Trail]]:
    """All arrays and objects below `root`, which holds the value, and root itself. Raises JsonFault at MAX_DEPTH."""
    below: list[tuple[_Container, _Trail, int]] = [(root, None, 0)]
    while below:
        container, trail, depth = below.pop()
        if depth > MAX_DEPTH:
            raise JsonFault(f"nests deeper than {MAX_DEPTH} levels", _path(trail))
        yield container, trail
        for key, item in _items(container):
            if isinstance(item, dict | list):
                below.append((item, (trail, key), depth + 1))


def _items(container: _Container) -> Iterator[tuple[str | int, object]]:
    return iter(container.items()) if isinstance(container, dict) else enumerate(container)


def _put(container: _Container, key: str | int, value: object) -> None:
    container[key] = value  # type: ignore[index]  # a key of this very container


def _check_text(text: str, trail: _Trail, verb: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise JsonFault(f"{verb} half of a surrogate pair, {half}, which is no text", _path(trail)) from error


def _path(trail: _Trail) -> str:
    """The path of a value, as OpenAI writes it; of a deep one the beginning."""
    keys: list[str | int] = []
    while trail is not None:
        trail, key = trail
        keys.append(key)
    text = ""
    for key in keys[-2:-8:-1]:  # the last is the place in `root`
        text += f"[{key}]" if isinstance(key, int) else f".{printable(key)}"
    return text.removeprefix(".")


def printable(text: str, length: int = _SHOWN) -> str:
    """Return text of a client's as a message can show it: cut to `length`, halves of surrogate pairs escaped."""
    shown = text if len(text) <= length else f"{text[:length]}..."
    return shown.encode("utf-8", "backslashreplace").decode()
