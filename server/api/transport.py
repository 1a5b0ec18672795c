"""HTTP plumbing: bounded JSON bodies, work that ends with its client, and server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import suppress
from typing import TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guiderail.server.openai_errors import ApiError, bad_request, from_exception
from guiderail.server.settings import OperatorLimits
from guiderail.server.state import ServerState
from guiderail.server.strict_json import JsonFault, read_body

T = TypeVar("T")
KEEP_ALIVE_S = 10.0  # proxies cut silent connections, and a guide may search for minutes before it commits to a word
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS_AFTER_S = 2.0  # how long a stream's start may wait for a first event, to report errors by status
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed its connection before the answer was ready."""


async def read_object(request: Request, state: ServerState) -> dict[str, object]:
    """The request's JSON object. Raises ApiError (400, 413), and ClientGone.

    Its size goes to `request.state.body_bytes`, which tells how much work the request may be.
    """
    limits, body = state.settings.limits, bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.max_body_bytes:
                raise body_too_large(limits)
    except ClientDisconnect as error:
        raise ClientGone from error
    if body.count(b",") + body.count(b"[") + body.count(b"{") > limits.max_body_values:
        raise _too_large(f"{limits.max_body_values} commas and opening brackets (limits.max_body_values)")
    request.state.body_bytes = len(body)
    try:
        value = await state.workers.run(request.state.client, len(body), lambda: read_body(body))
    except JsonFault as fault:
        if fault.path:
            raise bad_request(f"'{fault.path}' {fault}", fault.path) from fault
        raise ApiError(400, f"the body {fault}", code="invalid_json") from fault
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def body_too_large(limits: OperatorLimits) -> ApiError:
    """The refusal of a body that is longer than the operator allows."""
    return _too_large(f"{limits.max_body_bytes} bytes (limits.max_body_bytes)")


def _too_large(what: str) -> ApiError:
    return ApiError(413, f"the body has more than {what}; this server allows no more", code="body_too_large")


async def until_disconnect(receive: Receive, work: Coroutine[object, None, T]) -> T:
    """Run `work`, cancelling it when the client goes away. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON body, written by pydantic's fast encoder."""
    return Response(to_json(value), status, headers, media_type="application/json")


def json_with(value: dict[str, object], name: str, items: Iterable[object]) -> bytes:
    """The JSON of an object with these items as its list `name`. Written one by one: nothing else runs during each."""
    pieces = b",".join(map(to_json, items))
    return to_json({key: each for key, each in value.items() if key != name})[:-1] + b',"%b":[%b]}' % (
        name.encode(),
        pieces,
    )


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    """The HTTP form of an error."""
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.close:
        headers["Connection"] = "close"
    return json_response(error.body, error.status, headers)


def json_event(value: object) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def error_event(error: Exception) -> bytes:
    """The event that tells the client of an error."""
    return json_event(from_exception(error).body)


async def event_stream(
    receive: Receive, source: AsyncGenerator[bytes, None], headers: dict[str, str] | None = None
) -> "EventStream":
    """Start a stream once its first event is there, or after HEADERS_AFTER_S; close `source` if it is not to start.

    Raises what `source` raises until then, so that early errors have an HTTP status, and ClientGone.
    """
    first: asyncio.Task[bytes] = asyncio.ensure_future(anext(source))
    try:
        await until_disconnect(receive, _ready(first))
    except BaseException:
        await _ended(first, source)
        raise
    return EventStream(first, source, headers or {})


async def _ready(first: "asyncio.Task[bytes]") -> None:
    done, _ = await asyncio.wait({first}, timeout=HEADERS_AFTER_S)
    if done:
        first.result()


async def _ended(first: "asyncio.Task[bytes]", source: AsyncGenerator[bytes, None]) -> None:
    first.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await first
    await source.aclose()


class EventStream(Response):
    """Server-sent events from a generator, which is closed as soon as the client goes away.

    While nothing comes a comment line is sent now and then. Starlette's StreamingResponse may notice a lost client
    only when it next sends, which for a guide that is still searching can be long after.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: "asyncio.Task[bytes]", source: AsyncGenerator[bytes, None], headers: dict[str, str]
    ) -> None:
        """first: `source`'s first event, asked for already. An error that comes in its stead is sent as an event."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._first = first
        self._source = source
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send))
        except (ClientGone, OSError):
            pass
        finally:
            await _ended(self._first, self._source)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._last_sent = asyncio.get_running_loop().time()
        # A task of its own, and not a timer around each event: that would cost more than the event does.
        keeping_alive = asyncio.create_task(self._keep_alive(send))
        try:
            await self._send_event(send, await self._first_event())
            async for event in self._source:
                await self._send_event(send, event)
        finally:
            keeping_alive.cancel()
            await asyncio.gather(keeping_alive, return_exceptions=True)
        await send({"type": "http.response.body", "body": b""})

    async def _first_event(self) -> bytes:
        try:
            return await self._first
        except Exception as error:  # too late for a status; `source` has ended with it
            return error_event(error) + DONE

    async def _send_event(self, send: Send, event: bytes) -> None:
        await send({"type": "http.response.body", "body": event, "more_body": True})
        self._last_sent = asyncio.get_running_loop().time()

    async def _keep_alive(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(max(0.0, self._last_sent + KEEP_ALIVE_S - clock()))
            if clock() >= self._last_sent + KEEP_ALIVE_S:
                await self._send_event(send, KEEP_ALIVE)
