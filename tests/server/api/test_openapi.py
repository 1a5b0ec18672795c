"""The OpenAPI description: its references resolve, its schemas are valid, and every route is described."""

from collections.abc import Iterator

import httpx
import pytest
from fakes import ScriptedEngine, make_state
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator
from pydantic import JsonValue

from guiderail.server.api.app import create_app


@pytest.fixture(scope="module")
def app() -> object:
    return create_app(make_state(ScriptedEngine(), api_key=["k"]))


async def document(app: object) -> dict[str, dict[str, JsonValue]]:
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return (await client.get("/openapi.json", headers={"Authorization": "Bearer k"})).json()  # type: ignore[no-any-return]


def references(value: JsonValue) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(found := value.get("$ref"), str):
            yield found
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


async def test_every_reference_resolves_within_it(app: object) -> None:
    whole = await document(app)
    found = set(references(whole))  # type: ignore[arg-type]
    assert {"#/components/schemas/ChatRequest", "#/components/schemas/Error"} <= found
    for each in found:
        assert each.startswith("#/")
        place: JsonValue = whole  # type: ignore[assignment]
        for part in each.removeprefix("#/").split("/"):
            assert isinstance(place, dict), each
            assert part in place, each
            place = place[part]


async def test_it_has_the_structure_of_openapi_3_1(app: object) -> None:
    whole = await document(app)
    assert str(whole["openapi"]).startswith("3.1.")
    assert set(whole) <= {"openapi", "info", "paths", "components", "security"}
    for schema in whole["components"]["schemas"].values():  # type: ignore[union-attr]
        Draft202012Validator.check_schema(schema)
    ids = []
    for path, item in whole["paths"].items():
        assert isinstance(item, dict)
        for method, operation in item.items():
            assert method in ("get", "post"), path
            assert isinstance(operation, dict)
            ids.append(operation["operationId"])
            responses = operation["responses"]
            assert isinstance(responses, dict)
            assert {"200", "4XX", "5XX"} == set(responses), path
            assert all(isinstance(each, dict) and each["description"] for each in responses.values())
            named = {each["name"] for each in operation.get("parameters", ()) if each["required"]}  # type: ignore[union-attr,call-overload,index]
            assert named == {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert ("requestBody" in operation) == (method == "post")
    assert len(ids) == len(set(ids))


async def test_every_route_is_in_it_and_says_what_it_does(app: object) -> None:
    whole = await document(app)
    routes = [route for route in app.routes if isinstance(route, APIRoute)]  # type: ignore[attr-defined]
    assert len(routes) >= 10
    for route in routes:
        for method in route.methods:
            operation = whole["paths"][route.path_format][method.lower()]  # type: ignore[index,call-overload]
            assert operation["summary"]
            assert operation["description"]  # type: ignore[index]


async def test_keys_are_in_it_where_requests_need_one(app: object) -> None:
    assert (await document(app))["security"] == [{"key": []}]
    assert "security" not in await document(create_app(make_state(ScriptedEngine())))
