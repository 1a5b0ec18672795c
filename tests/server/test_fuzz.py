"""Every route, asked all kinds of things: no 5xx, no answer that is not JSON, nothing left running. See `make fuzz`."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fuzz_check import Idle, fault
from fuzz_run import fuzz, scripted
from nasty_bodies import REQUESTS

from guiderail.server.models.renderer import ChatRenderer

SAMPLE = 500
Opened = tuple[asyncio.AbstractEventLoop, httpx.AsyncClient, Idle]


@pytest.fixture(scope="module")
def opened(model_path: str) -> Iterator[Opened]:
    """A scripted server and a loop of its own, which hypothesis can run its examples on."""
    loop = asyncio.new_event_loop()
    opening: Any = scripted(ChatRenderer(model_path))
    client, idle = loop.run_until_complete(opening.__aenter__())
    yield loop, client, idle
    loop.run_until_complete(opening.__aexit__(None, None, None))
    loop.close()


@pytest.mark.parametrize("name", REQUESTS)
def test_what_has_hurt_a_server_hurts_none(opened: Opened, name: str) -> None:
    loop, client, idle = opened
    assert loop.run_until_complete(fault(client, REQUESTS[name], idle)) == ""


def test_a_sample_of_the_fuzz_finds_nothing(opened: Opened) -> None:
    findings = fuzz(*opened, SAMPLE, seed=None)
    assert findings.lines() == []
    assert findings.count >= SAMPLE


def test_the_fuzz_sees_faults(opened: Opened) -> None:
    """It would say so if something were left running, hung, or were no error of OpenAI's."""
    loop, client, _ = opened

    async def busy() -> str:
        return "left behind: 1 sequences"

    assert loop.run_until_complete(fault(client, REQUESTS["no body"], busy)) == "left behind: 1 sequences"

    def broken(request: httpx.Request) -> httpx.Response:
        return answers[request.url.path]

    async def idle() -> str:
        return ""

    answers = {
        "/a": httpx.Response(500, json={"error": {"message": "m 12", "type": "server_error", "param": None, "code": "c"}}),
        "/b": httpx.Response(400, text="no"),
        "/c": httpx.Response(400, json={"error": {"message": "m", "type": "t"}}),
        "/d": httpx.Response(200, content=b'{"x": NaN}', headers={"content-type": "application/json"}),
        "/e": httpx.Response(200, content=b'data: {"x": 1}\n\n', headers={"content-type": "text/event-stream"}),
        "/f": httpx.Response(
            200, content=b'data: {"error": {"message": "m", "type": "server_error", "code": "c"}}\n\ndata: [DONE]\n\n',
            headers={"content-type": "text/event-stream"},
        ),
        "/g": httpx.Response(200, json={"choices": []}),
    }  # fmt: skip
    other = httpx.AsyncClient(transport=httpx.MockTransport(broken), base_url="http://test")
    found = [loop.run_until_complete(fault(other, REQUESTS["no body"]._replace(path=path), idle)) for path in answers]
    expected = [
        "500 c: m #",
        "no error of OpenAI's",
        "another shape",
        "no JSON",
        "without [DONE]",
        "500 c: m",
        "no choices",
    ]
    assert all(words in each for words, each in zip(expected, found, strict=True)), found
