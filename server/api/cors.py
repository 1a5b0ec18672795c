"""Cross-origin requests: pages of the origins that the operator allows may ask from browsers, and read our headers."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Send

from guiderail.server.api.transport import error_response
from guiderail.server.openai_errors import ApiError

# What a page may read without being allowed to, and what is no news to it.
KNOWN = frozenset({"cache-control", "content-length", "content-type", "connection", "date", "server", "vary"})


class Cors(CORSMiddleware):
    """Starlette's, with refusals in OpenAI's shape. Every header of a response is exposed, whichever they are."""

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        super().__init__(app, origins, ("GET", "HEAD", "POST"), ("*",), max_age=3600)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin = request_headers["origin"][:100]
        refusal = error_response(
            ApiError(403, f"{bytes(response.body).decode()}: origin '{origin}'; see --allowed-origin", code="cors")
        )
        refusal.headers["Vary"] = response.headers["vary"]
        return refusal

    async def send(self, message: Message, send: Send, request_headers: Headers) -> None:
        if message["type"] == "http.response.start" and "origin" in request_headers:
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Expose-Headers"] = ", ".join(
                ["X-Request-Id", *(name for name in headers if name not in KNOWN)]
            )
        await super().send(message, send, request_headers)
