"""A client's connection: uvicorn's, with an end to everything that a client may leave unfinished.

| what is slow | counts from | ends with |
|---|---|---|
| a connection without a request | its opening, or the last answer | the connection |
| a request's headers | their first byte | 408 |
| a request's body | the headers' end | 408 (reception.py) |
| what is left of a body after its answer | the answer | the connection |
| a client that does not read its answer | the moment when nothing more can be sent | the connection |

Requests that are no HTTP get their refusal as JSON, like all others.
"""

import asyncio
from collections.abc import Callable
from functools import partial

import httptools
import uvicorn
from pydantic_core import to_json
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from guiderail.server.api.request_log import HEADER, log_refusal, new_id
from guiderail.server.api.transport import error_response
from guiderail.server.openai_errors import ApiError
from guiderail.server.settings import Settings

MAX_HEAD_BYTES = 64 * 2**10
MAX_AHEAD = 8  # requests sent before the present one is answered
LINGER_S = 5.0  # for a client to read why its connection is closed, and to end a body that nobody reads
GRACE_S = 2.0  # for clients to read the last bytes of their answers at the server's end


def uvicorn_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """The configuration of uvicorn for an application on such connections."""
    return uvicorn.Config(
        app,
        http=partial(Connection, settings),  # type: ignore[arg-type]  # it is only ever called
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,  # type: ignore[arg-type]  # given to asyncio.wait_for
    )


class Connection(HttpToolsProtocol):
    """One connection, with the timers of `settings`."""

    def __init__(self, settings: Settings, **uvicorns: object) -> None:
        super().__init__(**uvicorns)  # type: ignore[arg-type]
        self._settings = settings
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None  # `cycle` is the last, which may wait behind it
        self._in_head = self._in_body = self._deaf = False
        self._head_bytes = self._waiting_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            self.app = partial(_full, self._settings.max_connections)
        self._within(self._settings.header_timeout_s, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()
        self._drop_running()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        head = self.headers if self._in_head else None
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            if self._deaf:
                return
            cause = error.__context__
            self._refuse(cause if isinstance(cause, ApiError) else _malformed(error))
            return
        if self._in_head and self.headers is head:  # a single header that does not end
            self._waiting_bytes += len(data)
            if self._waiting_bytes > MAX_HEAD_BYTES:
                self._refuse(_head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._waiting_bytes = True, 0, 0
        self._within(self._settings.header_timeout_s, self._head_is_late)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)  # with what stands between them

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._stop_timer()
        super().on_headers_complete()
        if self.pipeline:
            self.flow.resume_reading()  # else it is not seen that the client hangs up
            if len(self.pipeline) > MAX_AHEAD:
                self._drop_last()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > HIGH_WATER_LIMIT:
            self._drop_last()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():  # its body is still to come
            return
        super().on_message_complete()
        self._in_body = False
        if self.cycle.response_complete:
            self._within(self._settings.idle_timeout_s, self._end)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # ours does not end with the next byte
        if self.transport.is_closing():
            self._within(self._settings.write_timeout_s, self.transport.abort)
        elif self.cycle.response_complete and not self._in_head:  # else the next request is on its way
            self._within(LINGER_S if self._in_body else self._settings.idle_timeout_s, self._end)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self._settings.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # To something that we do not speak; the request is answered as it is. The parser takes it to be without a
            # body, which another one reads.
            framing = {b"content-length", b"transfer-encoding"}
            head = b"".join(name + b": " + value + b"\r\n" for name, value in self.headers if name in framing)
            self.cycle.keep_alive = False
            self.parser = httptools.HttpRequestParser(_Body(self))
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(b"POST / HTTP/1.1\r\nConnection: close\r\n" + head + b"\r\n")
            self.parser.feed_data(data[upgrade.args[0] :])

    def _count(self, more: int) -> None:
        self._head_bytes += more
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _head_too_large()

    def _within(self, seconds: float, act: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, act)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _busy(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _drop_running(self) -> None:
        """Have the request that runs find its client gone."""
        if self._running is not None and self._busy():
            self._running.disconnected = True
            self._running.message_event.set()

    def _head_is_late(self) -> None:
        if self._busy():  # it was sent ahead of the present answer, and its time has not begun
            self._within(self._settings.header_timeout_s, self._head_is_late)
        else:
            limit = self._settings.header_timeout_s
            self._refuse(ApiError(408, f"the headers did not arrive within {limit:g} s", code="request_timeout"))

    def _end(self) -> None:
        """Close the connection, with what is still to be sent or, if the client does not read it, without."""
        self.transport.close()
        self._within(self._settings.write_timeout_s, self.transport.abort)

    def _drop_last(self) -> None:
        """Leave the last request that was sent ahead unanswered, as HTTP allows: the connection ends before it."""
        self._deaf = True
        self.pipeline.popleft()
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is not None:
            last.keep_alive = False
        self.flow.resume_reading()
        raise ConnectionAbortedError  # out of the parser

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request, and end the connection."""
        self._deaf = True
        busy = self._busy()
        self._drop_running()  # its rest is missing, or it is followed by what is to be refused
        if self._running is not None and busy and self._running.response_started:
            self.transport.abort()
            return
        request_id, body = new_id(), to_json(error.body)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (HEADER, request_id.encode()),
        ]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + body)
        self.transport.write_eof()  # not `close`: bytes that come after it would make the client lose the answer
        self._within(LINGER_S, self.transport.abort)
        if not busy:
            log_refusal(request_id, error)


class _Body:
    """The part of a connection that its body's parser tells of it."""

    def __init__(self, connection: Connection) -> None:
        self.on_body = connection.on_body
        self.on_message_complete = connection.on_message_complete


async def _full(most: int, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request on a connection too many."""
    why = f"the server has {most} connections open, its most; try again soon"
    refusal = ApiError(503, why, type="server_error", code="overloaded", retry_after_s=1, close=True)
    await error_response(refusal)(scope, receive, send)


def _malformed(error: httptools.HttpParserError) -> ApiError:
    why = "its URL cannot be read" if error.__context__ is not None else str(error)
    return ApiError(400, f"this is no valid HTTP/1.1 request: {why}", code="invalid_http")


def _head_too_large() -> ApiError:
    return ApiError(431, f"request line and headers exceed {MAX_HEAD_BYTES} bytes", code="headers_too_large")
