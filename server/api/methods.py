"""Methods and paths as clients write them: HEAD wherever GET is, a slash at the end, and what a path allows."""

from fastapi import FastAPI
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})  # those that ask for no work


class PlainPaths:
    """Answers HEAD as GET without the body, and a path with a slash at its end as the one without."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/") or "/"
        if scope["method"] == "HEAD":

            async def bodiless(message: Message) -> None:
                await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

            await self._app({**scope, "path": path, "method": "GET"}, receive, bodiless)
        else:
            await self._app({**scope, "path": path}, receive, send)


def allowed_methods(app: FastAPI, path: str) -> list[str]:
    """Return the methods of all routes of a path, sorted."""
    found = {"OPTIONS"}
    for route in app.routes:
        match, _ = route.matches({"type": "http", "method": "OPTIONS", "path": path, "root_path": "", "headers": []})
        if match is not Match.NONE and isinstance(route, Route):
            found |= route.methods or set()
    return sorted(found | ({"HEAD"} if "GET" in found else set()))
