"""Requests at the server's end: new work is refused, and what still runs in the end is told so before it is cut off."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guiderail.server.api.methods import SAFE_METHODS
from guiderail.server.api.transport import DONE, error_event, error_response
from guiderail.server.openai_errors import ApiError
from guiderail.server.shutdown import Shutdown


class Draining:
    """Lets work pass until the shutdown begins, and ends it when that is over."""

    def __init__(self, app: ASGIApp, shutdown: Shutdown) -> None:
        self._app = app
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in SAFE_METHODS:
            await self._app(scope, receive, send)
        elif self._shutdown.begun:
            await _refuse("the server is shutting down and takes no new requests", scope, receive, send)
        else:
            await self._work(scope, receive, send)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = streams = complete = False

        async def noted(message: Message) -> None:
            nonlocal started, streams, complete
            if message["type"] == "http.response.start":
                started = True
                streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            with self._shutdown.working():
                await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._shutdown.over or task is None:
                raise
            task.uncancel()
            why = "the server is shutting down, and the request did not end within the time that it gives"
            if not started:
                await _refuse(why, scope, receive, send)
            elif streams and not complete:
                last = error_event(_error(why)) + DONE
                await send({"type": "http.response.body", "body": last, "more_body": False})


async def _refuse(why: str, scope: Scope, receive: Receive, send: Send) -> None:
    await error_response(_error(why))(scope, receive, send)


def _error(why: str) -> ApiError:
    return ApiError(503, why, type="server_error", code="shutting_down", retry_after_s=10, close=True)
