"""The ASGI application: routes, authentication and errors in OpenAI's shape. No module globals."""

from importlib.metadata import version

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from guiderail.server.api.cors import Cors
from guiderail.server.api.draining import Draining
from guiderail.server.api.methods import PlainPaths, allowed_methods
from guiderail.server.api.openapi import describe
from guiderail.server.api.reception import Reception
from guiderail.server.api.request_log import HUNG_UP, RequestLog
from guiderail.server.api.routes import build_router
from guiderail.server.api.transport import ClientGone, error_response
from guiderail.server.keys import Keys
from guiderail.server.openai_errors import ApiError, from_exception
from guiderail.server.requests.clients import NOBODY, Client, at_address
from guiderail.server.state import ServerState

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})


def create_app(state: ServerState) -> FastAPI:
    """The application over a ready state."""
    settings = state.settings
    app = FastAPI(title="Guiderail", version=version("guiderail"), description="Decoding-time alignment server.")
    app.include_router(build_router(state))
    describe(app, settings.limits, keys=bool(state.keys))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return error_response(ApiError(404, f"there is no '{request.url.path[:200]}' here", code="not_found"))
        if error.status_code != 405:
            return error_response(ApiError(error.status_code, str(error.detail)))
        allowed = ", ".join(allowed_methods(app, request.scope["path"]))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": allowed})
        refused = ApiError(405, f"{request.method} is not allowed here; {allowed} are", code="method_not_allowed")
        return error_response(refused, {"Allow": allowed})

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: Exception) -> Response:
        return error_response(from_exception(error))

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=HUNG_UP)  # nobody reads it

    # The first of these is the innermost.
    app.add_middleware(Draining, shutdown=state.shutdown)
    app.add_middleware(Reception, timeout_s=settings.body_timeout_s, limits=settings.limits)
    app.add_middleware(Identity, keys=state.keys)
    app.add_middleware(PlainPaths)
    if settings.allowed_origin:
        app.add_middleware(Cors, origins=settings.allowed_origin)
    app.add_middleware(RequestLog)
    return app


class Identity:
    """Tells clients apart, by the key of `Authorization: Bearer KEY` or, where none is asked for, by address.

    A key is asked for everywhere but on OPEN_PATHS. Handlers find the client as `request.state.client`.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = self._client(scope)
        if client is None and scope["path"] not in OPEN_PATHS:
            refused = ApiError(
                401, "missing or wrong API key: send 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
            await error_response(refused)(scope, receive, send)
            return
        scope["state"]["client"] = client or NOBODY
        await self._app(scope, receive, send)

    def _client(self, scope: Scope) -> Client | None:
        """Return whose request it is, None if a key is needed and there is none."""
        if not self._keys:
            return at_address((scope.get("client") or ("unknown",))[0])
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, given = header.partition(b" ")
        name = self._keys.name_of(given.strip())
        return Client("key", name) if scheme.lower() == b"bearer" and name is not None else None
