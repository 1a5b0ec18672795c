"""The sampling fields of a request: what a guide refuses of them, and what they are to the engine."""

import json
from dataclasses import fields

from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import SamplingSpec
from guiderail.server.bounded.bounded import bounded
from guiderail.server.openai_errors import bad_request
from guiderail.server.requests.schemas import ChatRequest, CompletionRequest, SamplingFields


def refuse_unkept(name: str, guide: Guide, request: SamplingFields) -> None:
    """Raise ApiError (400) for a field that is set and that the guide called `name` cannot keep."""
    form = request.response_format
    if form is not None and form.type != "text" and not guide.keeps_format:
        raise bad_request(f"guide '{name}' cannot keep a response_format", "response_format")
    for field in guide.refuses():
        default = type(request).model_fields[field].default
        off: list[object] = [default, None, {}, [], *([-1] if field == "top_k" else [])]
        if getattr(request, field) not in off:
            allowed = "out" if default is None else f"at its default, {default}"
            raise bad_request(
                f"guide '{name}' chooses tokens in steps and cannot keep '{field}'; leave it {allowed}", field
            )


async def vet_format(request: SamplingFields, owner: str = "") -> None:
    """Have a response_format's schema made a grammar, as the engine will. owner: see Reward.vet. Raises ApiError."""
    form = request.response_format
    if form is not None and form.json_schema is not None:
        where = "response_format.json_schema.schema"
        try:
            await bounded().vet("check_grammar", json.dumps(form.json_schema.schema_), owner)
        except ValueError as error:
            raise bad_request(f"'{where}' {error}", where) from error


def sampling_spec(request: ChatRequest | CompletionRequest, max_tokens: int, stops: tuple[str, ...]) -> SamplingSpec:
    """Return how a request's answers are sampled. stops: the prompter's, besides the request's own.

    A field that the schema and SamplingSpec call the same is the same.
    """
    schema = None
    if request.response_format is not None and request.response_format.type != "text":
        given = request.response_format.json_schema
        schema = given.schema_ if given is not None else {"type": "object"}
    same = {f.name: getattr(request, f.name) for f in fields(SamplingSpec) if f.name in SamplingFields.model_fields}
    own = {
        "max_tokens": max_tokens,
        "top_k": max(0, request.top_k),
        "stop": (*request.stops, *stops),
        "stop_token_ids": tuple(request.stop_token_ids),
        "logit_bias": request.logit_bias or {},
        "bad_words": tuple(request.bad_words),
        "allowed_token_ids": None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        "logprobs": request.num_logprobs,
        "json_schema": schema,
    }
    return SamplingSpec(**same | own)
