"""Reads parts of the alignment object: names with parameters, models, texts, flags. Errors are 400s with the field."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from guiderail.server.openai_errors import bad_request, from_validation


def named(spec: Any, where: str, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Splits {"name": ..., parameters} (or a bare name) and checks the name. Raises ApiError (400)."""
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, dict):
        raise bad_request(f"'{where}' must be a name or an object with one", where)
    rest = dict(spec)
    name = rest.pop("name", None)
    if name is None:
        raise bad_request(f"'{where}.name' is required", f"{where}.name", "missing_required_parameter")
    if not isinstance(name, str) or name not in known:
        raise bad_request(f"'{where}.name': no '{name}' here; known: {', '.join(sorted(known))}", f"{where}.name")
    return name, rest


def parse(model: type[BaseModel], values: Any, where: str, also: tuple[str, ...] = ()) -> Any:
    """The model of an object's fields; `also` are further fields that are allowed there. Raises ApiError (400)."""
    if not isinstance(values, dict):
        raise bad_request(f"'{where}' must be an object", where)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        fields = (info.alias or name for name, info in model.model_fields.items())
        raise from_validation(error, where, (*also, *fields)) from error


def text(value: Any, where: str) -> str:
    """A non-empty string. Raises ApiError (400)."""
    if not isinstance(value, str) or not value:
        raise bad_request(f"'{where}' must be a non-empty string", where)
    return value


def flag(value: Any, where: str) -> bool:
    """True or false. Raises ApiError (400)."""
    if not isinstance(value, bool):
        raise bad_request(f"'{where}' must be true or false", where)
    return value


def number(value: Any, where: str) -> float:
    """A finite number. Raises ApiError (400)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise bad_request(f"'{where}' must be a finite number", where)
    return float(value)
