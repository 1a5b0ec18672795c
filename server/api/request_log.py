"""Ids of requests, which answers and every line of the log about a request carry, and a line for each request."""

import logging
import re
import time
import uuid
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guiderail.guides.core.metering import Spend
from guiderail.server.api.transport import error_response
from guiderail.server.openai_errors import ApiError, from_exception

log = logging.getLogger("guiderail.access")

HEADER = b"x-request-id"
USABLE = re.compile(rb"[!-~]{1,128}")  # printable, without spaces: it stands in a line of the log
PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds, and worth a line only if they fail
LONGEST_PATH = 200
HUNG_UP = 499  # nginx's status of a request whose client did not wait for the end of its answer

_current: ContextVar[str] = ContextVar("request_id", default="")


def new_id(given: bytes = b"") -> str:
    """Return a client's id of a request if it can be used, else a new one."""
    return given.decode() if USABLE.fullmatch(given) else uuid.uuid4().hex


def start_logging() -> None:
    """Log to standard error: warnings, and a line for each request."""
    handler = logging.StreamHandler()
    handler.setFormatter(_WithId("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    log.setLevel(logging.INFO)


def log_request(scope: Scope, status: int, seconds: float) -> None:
    """Write a request's line: method, path, status, seconds and, where a guide or a reward worked, tokens."""
    level = logging.DEBUG if scope["path"] in PROBES and status < 400 else logging.INFO
    spend = scope["state"].get("spend")
    log.log(
        level,
        "%s %s %d seconds=%.3f%s",
        scope["method"],
        _path(scope),
        status,
        seconds,
        _tokens(spend) if spend else "",
    )


def log_refusal(request_id: str, error: ApiError) -> None:
    """Write the line of what was no request."""
    token = _current.set(request_id)
    log.info("refused %d: %s", error.status, error)
    _current.reset(token)


def _path(scope: Scope) -> str:
    """Return a request's path as it was sent, in which no line can end."""
    raw: bytes = scope.get("raw_path", b"")
    return raw.decode("ascii", "replace")[:LONGEST_PATH]


def _tokens(spend: Spend) -> str:
    counts = {
        "prompt": spend.prompt_tokens,
        "completion": spend.tokens_accepted,
        "generated": spend.tokens_generated,
        "reward": spend.reward_tokens,
    }
    return "".join(f" {name}_tokens={count}" for name, count in counts.items() if count)


MOST_LOGGED = 16_000  # characters of a record: errors quote what clients sent, which may be megabytes


class _WithId(logging.Formatter):
    """Ends a record's first line with the id of the request that it is about. Cuts the middle out of a long one."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if len(text) <= MOST_LOGGED:
            return text
        half = MOST_LOGGED // 2
        return f"{text[:half]}\n... {len(text) - 2 * half} characters cut ...\n{text[-half:]}"

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        return f"{text} id={found}" if (found := _current.get()) else text


class RequestLog:
    """Gives each request its id and its line. What nobody below has caught becomes a 500 in OpenAI's shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_id(dict(scope["headers"]).get(HEADER, b""))
        scope.setdefault("state", {})
        token = _current.set(request_id)
        began, status, complete = time.perf_counter(), 0, False

        async def marked(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, request_id.encode())]}
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, marked)
        except Exception as error:
            log.error("%s %s failed", scope["method"], _path(scope), exc_info=error)
            if not status:
                await error_response(from_exception(error))(scope, receive, marked)
        finally:
            log_request(scope, status if complete else HUNG_UP, time.perf_counter() - began)
            _current.reset(token)
