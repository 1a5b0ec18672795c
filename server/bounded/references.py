"""The references of a JSON schema: they stay inside it, and following them ends."""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urljoin

MOST_AT_ONCE = 10_000  # schemas that look at one value

# Keywords whose schemas look at the same value as the schema that they stand in, and at a part of it.
SAME = ("not", "if", "then", "else", "allOf", "anyOf", "oneOf")
SAME_BY_NAME = ("dependentSchemas",)
PART = (
    "items", "prefixItems", "additionalItems", "contains", "additionalProperties", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
PART_BY_NAME = ("properties", "patternProperties")
KNOWN = ("https://json-schema.org/", "http://json-schema.org/")  # the metaschemas, which jsonschema brings

Schema = dict[str, Any]


class References:
    """A schema that is an object, and where its references lead."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._resource: dict[int, Schema] = {}  # the schema with an $id, or the root, that each object stands in
        self._named: dict[tuple[int, str], Schema] = {}  # by resource and anchor
        self._by_id: dict[str, Schema] = {}
        self._base = root["$id"] if isinstance(root.get("$id"), str) else ""
        self._scan()

    def _scan(self) -> None:
        left: list[tuple[object, Schema]] = [(self._root, self._root)]
        while left:
            value, resource = left.pop()
            if isinstance(value, list):
                left += [(each, resource) for each in value]
            if not isinstance(value, dict):
                continue
            if isinstance(own := value.get("$id"), str):
                resource = value
                self._by_id[urljoin(self._base, own)] = value
            self._resource[id(value)] = resource
            for keyword in ("$anchor", "$dynamicAnchor"):
                if isinstance(anchor := value.get(keyword), str):
                    self._named[id(resource), anchor] = value
            left += [(each, resource) for each in value.values()]

    def check(self) -> None:
        """Raise ValueError for a reference that leads nowhere, to itself, or over too many others to one value."""
        sizes: dict[int, int] = {}
        for schema in self.reached():
            self._size(schema, sizes)

    def reached(self) -> Iterator[Schema]:
        """All schemas that are objects, once each, those first that stand in others. Raises ValueError; see check."""
        seen: set[int] = set()
        left = [self._root]
        while left:
            schema = left.pop()
            if id(schema) in seen:
                continue
            seen.add(id(schema))
            yield schema
            left += [*self._same(schema), *_objects(schema, PART, PART_BY_NAME)]

    def _size(self, schema: Schema, sizes: dict[int, int]) -> int:
        """Return how many schemas look at a value for this one to; 0 in `sizes` are those that are being counted."""
        known = sizes.get(id(schema))
        if known == 0:
            raise ValueError(
                f"refers to itself without an end ({_shown(schema)}): a reference back must be to a part of the value"
            )
        if known is None:
            sizes[id(schema)] = 0
            known = 1 + sum(self._size(each, sizes) for each in self._same(schema))
            if known > MOST_AT_ONCE:
                raise ValueError(f"has references that stand for over {MOST_AT_ONCE} schemas for one value")
            sizes[id(schema)] = known
        return known

    def _same(self, schema: Schema) -> Iterator[Schema]:
        yield from _objects(schema, SAME, SAME_BY_NAME)
        for keyword in ("$ref", "$dynamicRef"):
            reference = schema.get(keyword)
            if isinstance(reference, str) and not reference.startswith(KNOWN):
                target = self._target(reference, schema)
                if isinstance(target, dict):
                    yield target

    def _target(self, reference: str, schema: Schema) -> object:
        """What a reference leads to. Raises ValueError."""
        place, _, fragment = reference.partition("#")
        resource: object = self._resource.get(id(schema), self._root)
        if place:
            resource = self._by_id.get(urljoin(self._base, place))
        if isinstance(resource, dict):
            found = _at(resource, unquote(fragment)) if fragment[:1] in ("", "/") else None
            found = self._named.get((id(resource), fragment)) if found is None else found
            if found is not None:
                return found
        raise ValueError(f"refers to {_shown(reference)}, which is not in it; nothing is looked up elsewhere")


def check_references(schema: object) -> None:
    """Raise ValueError for references of a schema that lead out of it, or without an end. See References.check."""
    if isinstance(schema, dict):
        References(schema).check()


def _objects(schema: Schema, plain: tuple[str, ...], by_name: tuple[str, ...]) -> Iterator[Schema]:
    for keyword in plain:
        value = schema.get(keyword)
        yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, dict))
    for keyword in by_name:
        value = schema.get(keyword)
        if isinstance(value, dict):
            yield from (each for each in value.values() if isinstance(each, dict))


def _at(resource: object, pointer: str) -> object:
    """What a JSON pointer leads to, or None."""
    value = resource
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and len(part) < 10 and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
