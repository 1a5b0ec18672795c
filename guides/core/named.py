"""A name with parameters, as requests and profiles write it: "args", or {"name": "args", "top_k": 10}."""

from collections.abc import Mapping
from dataclasses import dataclass


class NotNamed(ValueError):
    """A value that is neither a name nor an object with one. named: what an object has as its name, if it is one."""

    def __init__(self, *, is_object: bool, named: object = None) -> None:
        text = f"'name' must be a string, not {named!r}" if is_object else "must be a name or an object with one"
        super().__init__(text)
        self.is_object = is_object
        self.named = named


@dataclass(frozen=True, slots=True)
class Named:
    """The name, and the other fields of the object."""

    name: str
    params: Mapping[str, object]


def read_named(value: object) -> Named:
    """Read a bare name or an object with `name`. Raises NotNamed."""
    if isinstance(value, str):
        return Named(value, {})
    if not isinstance(value, Mapping):
        raise NotNamed(is_object=False)
    name = value.get("name")
    if not isinstance(name, str):
        raise NotNamed(is_object=True, named=name)
    return Named(name, {key: field for key, field in value.items() if key != "name"})
