"""Bodies as far as HTTP knows them: what they are encoded in, how long they may be, and how long they may take."""

import asyncio
from email.message import Message as MimeHeader

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guiderail.server.api.transport import body_too_large
from guiderail.server.openai_errors import ApiError
from guiderail.server.settings import OperatorLimits

CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
LARGE_BYTES = 2**20  # bodies below are always taken
MAX_LARGE_BYTES = 256 * 2**20  # of all large bodies that are not whole yet


class Reception:
    """Reads bodies for the application, which is raised ApiError (408, 413, 415, 503) where it asks for them."""

    def __init__(self, app: ASGIApp, timeout_s: float, limits: OperatorLimits) -> None:
        """timeout_s: seconds from a request's headers to the last byte of its body."""
        self._app = app
        self._limits = limits
        self._timeout_s = timeout_s
        self._large_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        deadline, whole, size = clock() + self._timeout_s, False, 0

        def forget() -> None:
            nonlocal size
            self._large_bytes -= size if size > LARGE_BYTES else 0
            size = 0

        async def part() -> Message:
            nonlocal whole, size
            if whole:
                return await receive()
            if not size:
                _check(Headers(scope=scope), self._limits)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise self._late() from None
            came = len(message.get("body", b""))
            if size + came > LARGE_BYTES:
                self._large_bytes += came if size > LARGE_BYTES else size + came
            size += came
            whole = not message.get("more_body", False)
            if whole:
                forget()
            elif size > LARGE_BYTES and self._large_bytes > MAX_LARGE_BYTES:
                raise ApiError(
                    503, "too many large bodies are being received; try again soon",
                    type="server_error", code="overloaded", retry_after_s=1,
                )  # fmt: skip
            return message

        try:
            await self._app(scope, part, send)
        finally:
            forget()

    def _late(self) -> ApiError:
        return ApiError(
            408, f"the body did not arrive within {self._timeout_s:g} s", code="request_timeout", close=True
        )


def _check(headers: Headers, limits: OperatorLimits) -> None:
    """Raise ApiError for a body that the headers say cannot be read."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise _unsupported(f"Content-Encoding '{encoding[:40]}' is not supported: send the body as it is")
    mime = MimeHeader()
    mime["content-type"] = headers.get("content-type", "")
    charset = mime.get_content_charset("utf-8")
    if charset not in CHARSETS:
        raise _unsupported(f"charset '{charset[:40]}' of the Content-Type is not supported: send UTF-8")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits.max_body_bytes:
        raise body_too_large(limits)


def _unsupported(why: str) -> ApiError:
    return ApiError(415, why, code="unsupported_media_type")
