"""What the bodies of all routes have in common: which fields are known, and what becomes of the others.

An unknown field is ignored, as other servers do, but the response says so (`ignored`). One that is nearly a known one
is refused, for it was meant to do something. With --strict-fields every unknown one is refused.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal

from pydantic import ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema, to_json

from guiderail.guides.core.types import Fields
from guiderail.server.strict_json import printable

STRICT = {"strict": True}  # the validation context under which every unknown field is refused
NEAR = 2  # edits between an unknown name and the known one that was probably meant
SHORT = 4  # letters: a shorter name is near too many others
MOST_UNKNOWN = 32  # fields of one object: to compare each with the known ones takes time
MOST_SAID = 20  # ignored fields that a response names

FaultKind = Literal["value_error", "missing", "unknown", "unsupported"]


def fault(param: str, message: str, kind: FaultKind = "value_error") -> PydanticCustomError:
    """A validation error about the field `param` of the model that is being checked."""
    return PydanticCustomError(kind, "{message}", {"message": message, "param": param})


class Schema(Fields):
    """Base of request bodies and their parts: null is absent, no NaN or infinity, unknown fields as above."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object, info: ValidationInfo) -> object:
        if not isinstance(data, Mapping):
            return data
        known = _names(cls)
        unknown = data.keys() - known
        if len(unknown) > MOST_UNKNOWN:
            message = f"one of {len(unknown)} unknown fields; at most {MOST_UNKNOWN} are ignored"
            raise fault(printable(min(unknown)), message, "unknown")
        for name in unknown:
            if data[name] is None:
                continue
            if meant := nearest(name, known):
                raise fault(printable(name), f"did you mean '{meant}'?", "unknown")
            if info.context == STRICT:
                raise fault(printable(name), f"allowed here: {', '.join(sorted(known))}", "unknown")
        return data

    @property
    def ignored(self) -> tuple[str, ...]:
        """Paths of fields that were given and that nobody knows, at most MOST_SAID of them."""
        return tuple(islice(_extras(self, ""), MOST_SAID))


def unknown_warnings(ignored: Sequence[str]) -> list[str]:
    """What a response says of fields that were ignored."""
    return [f"field '{path}' is unknown and was ignored" for path in ignored]


@cache
def _names(model: type[Schema]) -> frozenset[str]:
    return frozenset(info.alias or name for name, info in model.model_fields.items())


def _extras(model: Schema, prefix: str) -> Iterator[str]:
    yield from (f"{prefix}{printable(name)}" for name in model.model_extra or ())
    for name in model.model_fields_set - (model.model_extra or {}).keys():
        value = getattr(model, name)
        if isinstance(value, Schema):
            yield from _extras(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for index, each in enumerate(value):
                if not isinstance(each, Schema):
                    break
                yield from _extras(each, f"{prefix}{name}[{index}].")


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that an unknown one was probably meant to be, or None."""
    if name.lower() in known:
        return name.lower()
    candidates = [each for each in sorted(known) if len(each) >= SHORT and abs(len(each) - len(name)) <= NEAR]
    edits = {each: _edits(name, each) for each in candidates}
    best = min(candidates, key=edits.__getitem__, default=None)
    return best if best is not None and edits[best] <= NEAR else None


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance: letters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@dataclass(frozen=True, slots=True)
class Only:
    """Marks a field that is not served: taken where its value asks for what happens anyway, refused else.

    values: those that are taken. why: the reason that the client is given for refusing others.
    """

    why: str
    values: tuple[object, ...] = ()

    def __get_pydantic_core_schema__(self, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "enum": [*self.values, None], "description": f"Not served: {self.why}."}

    def _check(self, value: object) -> object:
        if value is None or any(type(value) is type(each) and value == each for each in self.values):
            return value
        given = "".join(f" or send {to_json(each).decode()}" for each in self.values)
        raise PydanticCustomError("unsupported", "{message}", {"message": f"{self.why}; leave it out{given}"})
