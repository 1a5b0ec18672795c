"""The ASGI application: routes, authentication and errors in OpenAI's shape. No module globals."""

import hmac
from importlib.metadata import version

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from guiderail.server.api.routes import build_router
from guiderail.server.api.transport import error_response, json_response
from guiderail.server.openai_errors import ApiError, openai_body
from guiderail.server.state import ServerState

OPEN_PATHS = frozenset({"/health", "/version"})


def create_app(state: ServerState) -> FastAPI:
    """The application over a ready state."""
    app = FastAPI(title="Guiderail", version=version("guiderail"), description="Decoding-time alignment server.")
    app.include_router(build_router(state))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return json_response(openai_body(error.status_code, str(error.detail)), error.status_code)

    if state.settings.api_key:
        app.add_middleware(BearerAuth, keys=tuple(state.settings.api_key))
    return app


class BearerAuth:
    """Asks for `Authorization: Bearer KEY` everywhere but on /health and /version."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        refused = ApiError(401, "missing or wrong API key: send 'Authorization: Bearer KEY'", code="invalid_api_key")
        await error_response(refused)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, given = header.partition(b" ")
        # All keys are compared, each in constant time, so that timing tells nothing.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
