"""The ASGI application: routes, authentication and errors in OpenAI's shape. No module globals."""

from importlib.metadata import version

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from guiderail.server.api.routes import build_router
from guiderail.server.api.transport import error_response, json_response
from guiderail.server.keys import Keys
from guiderail.server.openai_errors import ApiError, openai_body
from guiderail.server.requests.clients import NOBODY, Client, at_address
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

    app.add_middleware(Identity, keys=state.keys)
    return app


class Identity:
    """Tells clients apart, by the key of `Authorization: Bearer KEY` or, where none is asked for, by address.

    A key is asked for everywhere but on OPEN_PATHS. Handlers find the client as `request.state.client`.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            client = self._client(scope)
            if client is None and scope["path"] not in OPEN_PATHS:
                refused = ApiError(
                    401, "missing or wrong API key: send 'Authorization: Bearer KEY'", code="invalid_api_key"
                )
                await error_response(refused)(scope, receive, send)
                return
            scope.setdefault("state", {})["client"] = client or NOBODY
        await self._app(scope, receive, send)

    def _client(self, scope: Scope) -> Client | None:
        """Return whose request it is, None if a key is needed and there is none."""
        if not self._keys:
            return at_address((scope.get("client") or ("unknown",))[0])
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, given = header.partition(b" ")
        name = self._keys.name_of(given.strip())
        return Client("key", name) if scheme.lower() == b"bearer" and name is not None else None
