"""Schemas of structured answers: which are made grammars, and which are refused before the engine sees them."""

from typing import Any

import pytest
from pydantic import ValidationError

from guiderail.server.bounded.bounded import Refused, bounded
from guiderail.server.openai_errors import ApiError, from_validation
from guiderail.server.requests.sampling_fields import sampling_spec, vet_format
from guiderail.server.requests.schemas import ChatRequest

NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#"}}}}


def chat(schema: Any) -> ChatRequest:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "q"}], "response_format": form})


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        NODE,
        {"$ref": "#/$defs/n", "$defs": {"n": NODE | {"properties": {"next": {"$ref": "#/$defs/n"}}}}},
        {"enum": [f"value {i}" for i in range(1000)]},
        {"oneOf": [{"type": "integer"}, {"type": "null"}]},
        {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {}}, "required": ["a", "b"]}]},
        {"type": "string", "pattern": "^[a-z]{1,20}$"},
        {"type": "string", "format": "date-time"},
        {"type": "object", "patternProperties": {"^x": {"type": "integer"}}},
        {"type": "array", "prefixItems": [{"const": 1}], "minItems": 1, "maxItems": 50},
        {"type": "integer", "multipleOf": 7},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(200)}},
    ],
)
async def test_what_a_grammar_can_be_made_of(schema: Any) -> None:
    await vet_format(chat(schema))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#"}, "without an end"),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}, "without an end"),
        ({"$ref": "http://127.0.0.1:9/x"}, "nothing is looked up"),
        ({"type": "banana"}, "Invalid type: banana"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"$dynamicRef": "#a", "$defs": {"a": {"$dynamicAnchor": "a"}}}, "dynamicRef"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 10**400}, "number out of range"),
        ({"type": "string", "pattern": "(?=a)b"}, "cannot be made a grammar"),
        ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}, "cannot be made a grammar|at most"),
        ({"allOf": [{"anyOf": [{"const": i} for i in range(10)]}] * 8}, "cannot be made a grammar"),
        ({"type": 5}, "cannot be made a grammar"),
        ({"properties": []}, "cannot be made a grammar"),
    ],
)  # fmt: skip
async def test_what_no_grammar_can_be_made_of_is_a_400_that_names_the_schema(schema: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        try:
            await vet_format(chat(schema))
        except ValidationError as error:
            raise from_validation(error) from error
    assert refused.value.status == 400
    assert refused.value.body["error"]["param"] == "response_format.json_schema.schema"


def test_the_engine_gets_the_schema_that_was_tried() -> None:
    given = sampling_spec(chat(NODE), 5, ()).json_schema
    assert given is not None
    assert given["additionalProperties"] is False, "an object is closed unless it says otherwise"
    assert given["properties"] == NODE["properties"]
    assert "additionalProperties" not in NODE, "what the client sent stays as it is"


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {"a": {"properties": {"b": {}}}}}, True),
        ({"properties": {}, "additionalProperties": True}, True),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, None),
        ({"enum": [{"properties": {"a": 1}}]}, None),
    ],
)
async def test_only_schemas_of_objects_are_closed(schema: Any, closed: bool | None) -> None:
    given = sampling_spec(chat(schema), 5, ()).json_schema
    assert given is not None
    assert given.get("additionalProperties") is {None: None, True: given.get("additionalProperties")}[closed]
    for part in ("enum", "allOf"):
        assert given.get(part) == schema.get(part)
    if closed:
        inner: Any = given["properties"]
        assert all(each["additionalProperties"] is False for each in inner.values())


async def test_verdicts_do_not_depend_on_what_came_before() -> None:
    for _ in range(2):
        with pytest.raises(Refused, match="Unsatisfiable"):
            await bounded().vet("check_grammar", '{"type": "integer", "minimum": 5, "maximum": 3}')
