"""Run load tests against the scripted server in the test's own loop."""

import asyncio
from typing import Any

from timed_server import Scripted

from guiderail.loadtest.client.session import Options, measure
from guiderail.loadtest.load.plan import Cancellation, Requests
from guiderail.loadtest.load.runner import Load, Run, Unwatched
from guiderail.loadtest.load.sweep import Sweep
from guiderail.loadtest.load.traffic import TrafficClass
from guiderail.loadtest.report.records import Record
from guiderail.loadtest.report.result import Reporting

NOBODY_HANGS_UP = Cancellation()
PROMPTS = ("one", "two", "three", "four", "five")


def kind(name: str = "default", share: float = 1.0, *, stream: bool = True, **script: Any) -> TrafficClass:
    """A class of traffic that asks the scripted server for a behaviour."""
    return TrafficClass(name=name, share=share, stream=stream, body={"script": script})


async def load_test(
    server: Scripted | str,
    classes: list[TrafficClass],
    load: Load,
    *,
    slos: dict[str, float] | None = None,
    cancellation: Cancellation = NOBODY_HANGS_UP,
    sweep: Sweep | None = None,
    stop: asyncio.Event | None = None,
    endpoint: str = "/v1/chat/completions",
    model: str = "scripted",
    **options: Any,
) -> tuple[dict[str, Any], list[Run]]:
    """The result and the runs."""
    url = server if isinstance(server, str) else server.url
    requests = Requests(
        base_url=url, endpoint=endpoint, model=model, prompts=PROMPTS, slos=slos or {}, cancellation=cancellation
    )
    about = Reporting("test", model, url, endpoint, seed=0, slos=slos or {})
    made = Options(requests, classes, load, about, sweep=sweep, **options)
    return await measure(made, lambda title, load: Unwatched(), stop)


def by_id(server: Scripted, records: list[Record]) -> list[Any]:
    """The server's notes on each record's request."""
    noted = {served.headers["X-Request-Id"]: served for served in server.served}
    return [noted[record.request_id] for record in records]
