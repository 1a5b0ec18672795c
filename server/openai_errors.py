"""Errors as HTTP bodies, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from guiderail.guides.core.errors import (
    AlignmentField,
    DeadlinePassed,
    EngineUnavailable,
    FieldError,
    GuideFailed,
    GuideField,
    RequestError,
    RewardFailed,
    TooLong,
)
from guiderail.server.strict_json import printable

MAX_MESSAGE, MAX_PARAM = 2000, 200  # characters: an error quotes what a client sent, which may be megabytes


class ApiError(Exception):
    """An error that the client is told. `param` is the path of the field at fault. Long texts are cut."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        retry_after_s: int | None = None,
        close: bool = False,
    ) -> None:
        """close: end the connection with the answer."""
        message = printable(message, MAX_MESSAGE)
        param = None if param is None else printable(param, MAX_PARAM)
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.close = close
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


def bad_request(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field at fault."""
    return ApiError(400, message, param=param, code=code)


def from_exception(error: Exception) -> ApiError:
    """The API error for whatever a guide, reward or engine raised."""
    match error:
        case ApiError():
            return error
        case FieldError():
            text = "".join(part if isinstance(part, str) else f"'{_place(part)}'" for part in error.parts)
            return bad_request(text, _place(error.field))
        case TooLong():
            return bad_request(str(error), error.param, "context_length_exceeded")
        case RequestError():
            return bad_request(str(error), error.param)
        case EngineUnavailable():
            return ApiError(
                503, f"{error}; it is being restarted, try again soon",
                type="server_error", code="engine_unavailable", retry_after_s=10,
            )  # fmt: skip
        case RewardFailed():
            return ApiError(500, str(error), type="server_error", code="reward_failed", param=error.reward)
        case GuideFailed():
            return ApiError(500, str(error), type="server_error", code="guide_failed", param="alignment.guide")
        case DeadlinePassed():
            return ApiError(504, str(error), type="server_error", code="deadline_exceeded", param="alignment.budget")
        case _:
            return ApiError(500, f"internal error: {type(error).__name__}", type="server_error", code="internal_error")


def _place(field: AlignmentField | GuideField) -> str:
    """The path in the request of a field that a guide or the pipeline names."""
    return f"alignment.guide.{field.name}" if isinstance(field, GuideField) else f"alignment.{field.name}"


def from_validation(error: ValidationError, prefix: str = "", allowed: Sequence[str] = ()) -> ApiError:
    """A 400 from pydantic's first complaint, with the field's path as OpenAI writes it (a[0].b)."""
    first = _deepest(error)
    loc, within = first["loc"], first.get("ctx", {}).get("param")  # set by validators that look at several fields
    if first["type"] == "extra_forbidden":
        loc, within = loc[:-1], loc[-1]
    param = path(prefix, loc)
    if within:
        param += f".{within}" if param else str(within)
    if first["type"] == "unknown":
        return bad_request(f"unknown field '{param}'; {first['msg']}", param, "unknown_parameter")
    if first["type"] == "unsupported":
        return bad_request(f"'{param}': {first['msg']}", param, "unsupported_parameter")
    if first["type"] == "extra_forbidden":
        hint = f"; allowed here: {', '.join(sorted(allowed))}" if allowed else ""
        return bad_request(f"unknown field '{param}'{hint}", param, "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"'{param}' is required", param, "missing_required_parameter")
    return bad_request(f"'{param}': {_plain(first)}", param)


def _deepest(error: ValidationError) -> ErrorDetails:
    """Of the complaints about the first faulty field the one that got furthest: the union branch that was meant."""
    errors = error.errors()
    return max((e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]), key=lambda e: len(e["loc"]))


def path(prefix: str, loc: Sequence[int | str]) -> str:
    """Join a pydantic location to a path such as messages[0].role."""
    text = prefix
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif "[" not in part and "-" not in part and part not in ("str", "int", "float"):  # branches of unions
            text += f".{part}" if text else part
    return text


def _plain(error: ErrorDetails) -> str:
    if error["type"] == "int_parsing_size":
        return "must be an integer of at most 64 bits"
    return error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
