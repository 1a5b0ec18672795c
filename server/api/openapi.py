"""The OpenAPI description: bodies by their schemas, whose references resolve within it, errors, and keys."""

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from guiderail.server.requests.bounds import describe_bounds
from guiderail.server.requests.schemas import ChatRequest, CompletionRequest, ScoreRequest
from guiderail.server.settings import OperatorLimits

BODIES: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, ScoreRequest)
PLACE = "#/components/schemas/{model}"

ERROR = {
    "type": "object",
    "description": "An error in OpenAI's shape.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What is wrong, and what is allowed."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The path of the field at fault."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERROR_BODY = {"application/json": {"schema": {"$ref": PLACE.format(model="Error")}}}
ERRORS: dict[int | str, dict[str, object]] = {
    "4XX": {"description": "The request is refused, as the error says.", "content": _ERROR_BODY},
    "5XX": {"description": "The request failed, as the error says.", "content": _ERROR_BODY},
}
EVENTS: dict[int | str, dict[str, object]] = {
    200: {"description": "The answer, or with `stream` its events.", "content": {"text/event-stream": {}}}
}


def body_of(model: type[BaseModel]) -> dict[str, object]:
    """Return what a route's description says of its body, one of BODIES."""
    schema = {"$ref": PLACE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, limits: OperatorLimits, *, keys: bool) -> None:
    """Complete the application's description by what the routes refer to. keys: whether requests need one."""
    plain = app.openapi

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            document = plain()
            _, found = models_json_schema([(model, "validation") for model in BODIES], ref_template=PLACE)
            describe_bounds(found["$defs"].values(), limits)
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(found["$defs"], Error=ERROR)
            if keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
