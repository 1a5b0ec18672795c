"""The nested asynchronous generators that a streamed token crosses, from the scripted engine to the bytes sent."""

import inspect
import sys
from typing import Any

import httpx
import pytest
from fakes import ScriptedEngine, make_state

from guiderail.server.api.app import create_app

MOST = 7
MOST_HERE = 3  # in server/requests and server/api


def generators() -> list[str]:
    """Files of the asynchronous generators that are running, the innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR:
            found.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    return found


class Watched(ScriptedEngine):
    """Notes for every token which generators are waiting for it."""

    def __init__(self, seen: list[list[str]]) -> None:
        self.seen = seen
        super().__init__()

    @property  # type: ignore[override]
    def step_s(self) -> float:
        self.seen.append(generators())
        return 0.001

    @step_s.setter
    def step_s(self, value: float) -> None:
        pass


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"logprobs": True}])
async def test_a_streamed_token_crosses_few_generators(more: dict[str, Any]) -> None:
    seen: list[list[str]] = []
    body = {"messages": [{"role": "user", "content": "q"}], "stream": True, "max_tokens": 4} | more
    transport = httpx.ASGITransport(create_app(make_state(Watched(seen))))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert len(seen) == 4 * more.get("n", 1)
    for files in seen:
        assert any("/guides/sampling.py" in file for file in files)
        assert len(files) <= MOST, files
        assert sum("/server/requests/" in file or "/server/api/" in file for file in files) <= MOST_HERE
    if more.get("n", 1) == 1:  # several answers come from tasks of their own, by way of a queue
        assert all(any("/server/api/responses.py" in file for file in files) for files in seen)
