"""The HTTP routes. Handlers only: read, make a job, answer."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from guiderail.guides.core.errors import GuiderailError
from guiderail.guides.core.registry import describe
from guiderail.server.api.fold import chunks, resumed, whole
from guiderail.server.api.responses import ChatWire, TextWire, Wire
from guiderail.server.api.schemas import UNSUPPORTED, ChatRequest, CompletionRequest, ScoreRequest
from guiderail.server.api.transport import (
    ClientGone,
    EventStream,
    error_response,
    json_response,
    read_object,
    until_disconnect,
)
from guiderail.server.metrics import Load
from guiderail.server.models.cpu_features import description
from guiderail.server.openai_errors import ApiError, bad_request, from_exception, from_validation
from guiderail.server.requests.build import chat_job, completion_job
from guiderail.server.requests.score import score_request
from guiderail.server.rewards.models.neural import NeuralReward
from guiderail.server.state import ServerState

log = logging.getLogger("guiderail.server")
HEADERS_AFTER_S = 2.0  # how long a stream's start may wait for a first event, to report errors by status


def build_router(state: ServerState) -> APIRouter:
    """All routes over one server state."""
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completion, steered by the `alignment` object."""
        return await _complete(state, request, ChatRequest)

    @router.post("/v1/completions", openapi_extra=_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        """OpenAI's text completion, steered by the `alignment` object."""
        return await _complete(state, request, CompletionRequest)

    @router.get("/v1/models")
    async def models() -> Response:
        """The served model, its adapters, and each of them with every profile."""
        bases = [state.settings.model_name, *state.settings.lora]
        names = bases + [f"{base}@{profile}" for base in bases for profile in state.resolver.profile_names]
        data = [
            {
                "id": name,
                "object": "model",
                "created": state.created,
                "owned_by": "guiderail",
                "root": state.settings.model,
                "parent": name.partition("@")[0] if "@" in name else None,
                "max_model_len": state.engine.max_model_len,
            }
            for name in names
        ]
        return json_response({"object": "list", "data": data})

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

    @router.post("/v1/rewards/score", openapi_extra=_body(ScoreRequest))
    async def score(request: Request) -> Response:
        """Scores given answers to given messages: raw values by reward, and combined."""
        try:
            parsed = parse(ScoreRequest, await read_object(request))
            return json_response(await until_disconnect(request.receive, score_request(state, parsed)))
        except ClientGone:
            return Response(status_code=499)
        except Exception as error:
            return _failure("score", error)

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine serves, 503 while it is being restarted."""
        up = state.engine.up
        return json_response({"status": "ok" if up else "engine down, restarting"}, 200 if up else 503)

    @router.get("/version")
    async def server_version() -> Response:
        """The server's version, the processor with its instruction set, and the dtype that the engine computes in."""
        about = {"version": version("guiderail"), "processor": description(), "dtype": state.engine.dtype or None}
        return json_response(about)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        runners = {n: r.stats for n, r in state.rewards.items() if isinstance(r, NeuralReward) and r.stats is not None}
        waiting = state.admission.waiting
        engine = state.engine.stats
        load = Load(
            num_requests_running=state.metrics.in_flight - waiting,
            num_requests_waiting=waiting,
            waiting_tokens=state.admission.waiting_tokens,
            engine_rows=state.engine.num_running(),
            engine_up=state.engine.up,
            kv_cache_usage_perc=engine.kv_cache_usage,
            prefix_cache_queries=engine.prefix_queries,
            prefix_cache_hits=engine.prefix_hits,
            preemptions=engine.preemptions,
        )
        body = state.metrics.render(load, runners)
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _complete(
    state: ServerState, request: Request, model: type[ChatRequest] | type[CompletionRequest]
) -> Response:
    arrived = time.monotonic()
    try:
        parsed = parse(model, await read_object(request))
        wire: Wire
        if isinstance(parsed, ChatRequest):
            wire = ChatWire(chat_job(state, parsed, arrived), state.renderer)
        else:
            wire = TextWire(completion_job(state, parsed, arrived), state.renderer)
    except (ApiError, GuiderailError) as error:
        state.metrics.rejected()
        return error_response(from_exception(error))
    try:
        if parsed.stream:
            usage = parsed.stream_options is not None and parsed.stream_options.include_usage
            return await _stream(request, chunks(wire.job, wire, state.metrics, include_usage=usage))
        return json_response(await until_disconnect(request.receive, whole(wire.job, wire, state.metrics)))
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    except Exception as error:
        return _failure(wire.job.alignment.guide_name, error)


async def _stream(request: Request, source: AsyncGenerator[bytes, None]) -> Response:
    """Starts the stream once its first event is there, so that early errors have an HTTP status."""
    first: asyncio.Task[bytes] = asyncio.ensure_future(anext(source))
    try:
        await until_disconnect(request.receive, _ready(first))
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await source.aclose()
        raise
    return EventStream(resumed(first, source))


async def _ready(first: "asyncio.Task[bytes]") -> None:
    done, _ = await asyncio.wait({first}, timeout=HEADERS_AFTER_S)
    if done:
        first.result()


def _failure(what: str, error: Exception) -> Response:
    api_error = from_exception(error)
    if api_error.body["error"]["code"] in ("internal_error", "guide_failed"):
        log.error("request failed (%s)", what, exc_info=error)
    return error_response(api_error)


W = TypeVar("W", bound=BaseModel)


def parse(model: type[W], body: dict[str, Any]) -> W:
    """The wire model of a body. Raises ApiError (400)."""
    for name, reason in UNSUPPORTED.items():
        if name in body:
            raise bad_request(f"'{name}': {reason}", name, "unsupported_parameter")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise from_validation(
            error, allowed=list(model.model_fields) if len(error.errors()[0]["loc"]) == 1 else ()
        ) from error


def _body(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
