"""The HTTP routes. Handlers only: read, build a request, respond."""

import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from importlib.metadata import version
from typing import TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from guiderail.guides.core.errors import GuiderailError
from guiderail.guides.core.registry import describe
from guiderail.server.api.bodies import Body, ChatBody, Json, TextBody
from guiderail.server.api.openapi import ERRORS, EVENTS, body_of
from guiderail.server.api.responses import stream, whole
from guiderail.server.api.transport import (
    ClientGone,
    error_response,
    event_stream,
    json_response,
    json_with,
    read_object,
    until_disconnect,
)
from guiderail.server.metrics import Load
from guiderail.server.models.cpu_features import description
from guiderail.server.openai_errors import ApiError, from_exception, from_validation
from guiderail.server.requests import build
from guiderail.server.requests.bounds import check_counts
from guiderail.server.requests.sampling_fields import vet_format
from guiderail.server.requests.schemas import ChatRequest, CompletionRequest, ScoreRequest, StreamOptions
from guiderail.server.requests.score import Scoring, score, scoring
from guiderail.server.requests.wire import STRICT
from guiderail.server.rewards.models.backend import ModelReward
from guiderail.server.state import ServerState

log = logging.getLogger("guiderail.server")
IGNORED_HEADER = "X-Guiderail-Ignored-Fields"
SCORE_BYTES = 100  # of an answer's scores in a response, about
T = TypeVar("T")
S = TypeVar("S", bound=BaseModel)


def build_router(state: ServerState) -> APIRouter:
    """All routes over one server state."""
    router = APIRouter(responses=ERRORS)

    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest), responses=EVENTS)
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completion, steered by the `alignment` object."""
        return await _complete(state, request, ChatRequest)

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest), responses=EVENTS)
    async def completions(request: Request) -> Response:
        """OpenAI's text completion, steered by the `alignment` object."""
        return await _complete(state, request, CompletionRequest)

    @router.get("/v1/models")
    async def models() -> Response:
        """The served model, its adapters, and each of them with every profile."""
        return json_response({"object": "list", "data": [_model(state, name) for name in state.model_names]})

    @router.get("/v1/models/{model:path}")
    async def one_model(model: str) -> Response:
        """One of these models by its id, slashes included."""
        if model not in state.model_names:
            known = ", ".join(f"'{name}'" for name in state.model_names)
            refusal = ApiError(
                404, f"the model '{model[:200]}' is not served; there are {known}", param="model",
                code="model_not_found",
            )  # fmt: skip
            return error_response(refusal)
        return json_response(_model(state, model))

    @router.get("/v1/guides")
    async def guides() -> Response:
        """The guides a request may name, with their parameters."""
        data = [
            {
                "name": name,
                "description": describe(cls),
                "streams": cls.streams,
                "parameters": cls.Params.model_json_schema(),
            }
            for name, cls in sorted(state.guides.items())
        ]
        return json_response({"object": "list", "data": data})

    @router.get("/v1/rewards")
    async def rewards() -> Response:
        """The rewards a request may name, with their parameters."""
        data = [
            {"name": name, "description": describe(type(r)), "parameters": r.Params.model_json_schema()}
            for name, r in sorted(state.rewards.items())
        ]
        return json_response({"object": "list", "data": data})

    @router.post("/v1/rewards/score", openapi_extra=body_of(ScoreRequest))
    async def score_answers(request: Request) -> Response:
        """Score given answers to given messages: raw values by reward, and combined."""
        try:
            body = await read_object(request, state)
            work = await _off_loop(
                state, request, lambda: scoring(state, parse(state, ScoreRequest, body), request.state.client)
            )
            await state.resolver.vet(work.inputs[0][0].pipeline.asked.rewards, work.client.name, "rewards")
        except (ApiError, GuiderailError) as error:
            return _rejected(state, error)
        request.state.spend = work.spend
        return await _answered(work.label, _whole(request, _scores(state, work), _said(work.ignored)))

    @router.get("/health")
    async def health() -> Response:
        """200 while the process lives. Whether it can serve says /ready."""
        return json_response({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """200 while requests are served; 503, with the reason, while engine or rewards are down and at the end."""
        lack = state.lack
        return json_response({"status": lack or "ready"}, 503 if lack else 200)

    @router.get("/version")
    async def server_version() -> Response:
        """The server's version, the processor with its instruction set, and the dtype that the engine computes in."""
        about = {"version": version("guiderail"), "processor": description(), "dtype": state.engine.dtype or None}
        return json_response(about)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        runners = {n: r.stats for n, r in state.rewards.items() if isinstance(r, ModelReward) and r.stats is not None}
        waiting = state.admission.waiting
        engine = state.engine.stats
        load = Load(
            num_requests_running=state.metrics.in_flight - waiting,
            num_requests_waiting=waiting,
            waiting_tokens=state.admission.waiting_tokens,
            engine_rows=state.engine.num_running(),
            engine_up=state.engine.answers,
            kv_cache_usage_perc=engine.kv_cache_usage,
            prefix_cache_queries=engine.prefix_queries,
            prefix_cache_hits=engine.prefix_hits,
            preemptions=engine.preemptions,
        )
        body = state.metrics.render(load, runners)
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _model(state: ServerState, name: str) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "guiderail",
        "root": state.settings.model,
        "parent": name.partition("@")[0] if "@" in name else None,
        "max_model_len": state.engine.max_model_len,
    }


async def _complete(
    state: ServerState, request: Request, schema: type[ChatRequest] | type[CompletionRequest]
) -> Response:
    arrived = time.monotonic()
    try:
        given = await read_object(request, state)
        parsed, body = await _off_loop(state, request, lambda: _built(state, request, schema, given, arrived))
        await vet_format(parsed, body.request.client.name)
        await state.resolver.vet(body.request.alignment.rewards, body.request.client.name)
    except (ApiError, GuiderailError) as error:
        return _rejected(state, error)
    request.state.spend = body.request.spend
    headers = _said(parsed.ignored)
    if not parsed.stream:
        return await _answered(body.request.label, _whole(request, whole(state, body), headers))
    events = stream(state, body, parsed.stream_options or StreamOptions())
    return await _answered(body.request.label, event_stream(request.receive, events, headers))


def _built(
    state: ServerState,
    request: Request,
    schema: type[ChatRequest] | type[CompletionRequest],
    given: Json,
    arrived: float,
) -> tuple[ChatRequest | CompletionRequest, Body]:
    """What is asked for, and the body of its response. Raises ApiError and RequestError."""
    parsed = parse(state, schema, given)
    if isinstance(parsed, ChatRequest):
        return parsed, ChatBody(build.chat(state, parsed, arrived, request.state.client), state.renderer)
    return parsed, TextBody(build.completion(state, parsed, arrived, request.state.client), state.renderer)


async def _off_loop(state: ServerState, request: Request, work: Callable[[], T]) -> T:
    """The result of work on the request's whole body, which is done off the event loop if that is large."""
    return await state.workers.run(request.state.client, request.state.body_bytes, work)


async def _scores(state: ServerState, work: Scoring) -> bytes:
    found = await score(state, work)
    size = SCORE_BYTES * sum(len(candidates) for _, candidates in work.inputs)
    return await state.workers.run(work.client, size, lambda: json_with(found.rest, "data", found.data))


async def _whole(request: Request, work: Coroutine[object, None, bytes], headers: dict[str, str]) -> Response:
    content = await until_disconnect(request.receive, work)
    return Response(content, headers=headers, media_type="application/json")


def _said(ignored: Sequence[str]) -> dict[str, str]:
    """The header that names the fields that were ignored, as one line of ASCII."""
    names = ", ".join(ignored).encode("unicode_escape").decode()
    return {IGNORED_HEADER: names} if names else {}


def _rejected(state: ServerState, error: Exception) -> Response:
    """The response to a request that is refused before it runs."""
    state.metrics.rejected()
    return error_response(from_exception(error))


async def _answered(label: str, work: Coroutine[object, None, Response]) -> Response:
    """The response to a request that runs, an error if it fails."""
    try:
        return await work
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    except Exception as error:
        failure = from_exception(error)
        if failure.body["error"]["code"] in ("internal_error", "guide_failed"):
            log.error("request failed (%s)", label, exc_info=error)
        return error_response(failure)


def parse(state: ServerState, model: type[S], body: Json) -> S:
    """Check a body against its schema and the operator's settings. Raises ApiError (400)."""
    check_counts(body, state.settings.limits, state.engine.max_model_len)
    strict = state.settings.strict_fields
    try:
        return model.model_validate(body, context=STRICT if strict else None)
    except ValidationError as error:
        raise from_validation(error) from error
