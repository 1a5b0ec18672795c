"""Guides that break their contract: each is an error of its own name, streamed or whole, and nothing hangs."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import ScriptedEngine, make_state

from guiderail.guides.best_of_n import draw_scored
from guiderail.guides.core.context import Context
from guiderail.guides.core.guide import Guide, answer_events
from guiderail.guides.core.types import Candidate, Event, Final, Scored, Token
from guiderail.server.api.app import create_app

ANSWER = Candidate(0, "hello", (1,), "stop")
TOKEN = Token("hello", (1,))
FINAL = Final("stop", None, None, 0, (ANSWER,))


class Played(Guide):
    """Yields what it is given, raising what is an exception."""

    steers = False
    play: Callable[[], list[Any]] = staticmethod(lambda: [TOKEN, FINAL])

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        for event in type(self).play():
            if isinstance(event, BaseException):
                raise event
            yield event


class NoGenerator(Guide):
    """Its run is an ordinary coroutine."""

    steers = False

    async def run(self, ctx: Context) -> Any:  # type: ignore[override]
        return FINAL


class Divides(Guide):
    """Fails behind its draws, which have to be freed."""

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        drawn = await draw_scored(ctx, 3)
        yield Scored(tuple(drawn))
        for event in answer_events(drawn[1 // 0], drawn, None):
            yield event


def played(*events: Any) -> type[Guide]:
    return type("Played", (Played,), {"__doc__": "As told.", "play": staticmethod(lambda: list(events))})


async def ask(guide: type[Guide], debug: bool = False, **more: Any) -> tuple[int, Any]:
    """(status, body), or of a stream (status, its data lines)."""
    engine = ScriptedEngine()
    state = make_state(engine, debug=debug)
    state.resolver._guides["broken"] = guide
    transport = httpx.ASGITransport(create_app(state))
    body = {"messages": [{"role": "user", "content": "q"}], "alignment": {"guide": "broken", "rewards": ["last_digit"]}}
    async with asyncio.timeout(20), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/v1/chat/completions", json=body | more)
    assert engine.num_running() == 0
    if more.get("stream") and answer.status_code == 200:
        return 200, [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return answer.status_code, answer.json()


LINES = Path(__file__).read_text().splitlines()
BROKEN: list[tuple[type[Guide], str]] = [
    (played(TOKEN, TypeError("a bad day")), "TypeError: a bad day"),
    (played(KeyError("no_such")), "KeyError: 'no_such'"),
    (played(StopAsyncIteration()), "StopAsyncIteration"),
    (played(TOKEN, Final("tired", None, None, 0, (ANSWER,))), "its Final has finish_reason 'tired'"),
    (played(TOKEN), "it ended without a Final"),
    (played(), "it ended without a Final"),
    (played(TOKEN, FINAL, FINAL), "after its Final"),
    (played(FINAL, TOKEN), "after its Final"),
    (played(TOKEN, FINAL, ValueError("late")), "ValueError: late"),
    (played(TOKEN, Final("stop", None, None, 3, (ANSWER,))), "its Final chose 3, which is none of its 1 candidates"),
    (played(TOKEN, Final("stop", None, None, 0, ())), "its Final chose 0, which is none of its 0 candidates"),
    (played(TOKEN, Final("stop", None, None, None, (ANSWER,))), "its Final chose None"),  # type: ignore[arg-type]
    (played("hello", FINAL), "it yielded a value of type str, which is no event"),
    (played(None), "it yielded a value of type NoneType"),
    (played(Token(None, (1,)), FINAL), "which is no event"),  # type: ignore[arg-type]
    (played(SystemExit(3)), "SystemExit: 3"),
    (played(Token("half \ud83d", (1,)), FINAL), "which is no event"),
    (played(Token("hello", None), FINAL), "which is no event"),  # type: ignore[arg-type]
    (played(Token(b"hello", (1,)), FINAL), "which is no event"),  # type: ignore[arg-type]
    (played(TOKEN, Final("stop", None, None, 0, None)), "TypeError"),  # type: ignore[arg-type]
    (played(TOKEN, Final("stop", None, None, 0, (3,))), "AttributeError"),  # type: ignore[arg-type]
    (played(TOKEN, Final(3, None, None, 0, (ANSWER,))), "its Final holds"),  # type: ignore[arg-type]
    (played(TOKEN, Final("stop", object(), None, 0, (ANSWER,))), "its Final holds"),  # type: ignore[arg-type]
    (played(TOKEN, Final("stop", None, object(), 0, (ANSWER,))), "its Final holds"),  # type: ignore[arg-type]
    (played(TOKEN, Final("stop", None, None, 0, (replace(ANSWER, combined=object()),))), "its Final holds"),  # type: ignore[arg-type]
    (played(TOKEN, Final("stop", None, None, 0, (replace(ANSWER, text="\ud83d"),))), "its Final holds"),
    (played(object()), "which is no event"),
    (NoGenerator, "'run' gave a value of type coroutine and not an async generator"),
    (Divides, "ZeroDivisionError"),
]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("guide", "reason"), BROKEN, ids=lambda value: value if isinstance(value, str) else "")
async def test_a_broken_guide_is_named(guide: type[Guide], reason: str, n: int) -> None:
    status, body = await ask(guide, n=n)
    assert (status, body["error"]["code"], body["error"]["param"]) == (500, "guide_failed", "alignment.guide")
    assert body["error"]["message"].startswith("guide 'broken' failed: ")
    assert reason in body["error"]["message"]


@pytest.mark.parametrize(("guide", "reason"), BROKEN, ids=lambda value: value if isinstance(value, str) else "")
async def test_a_broken_guide_is_named_in_a_stream(guide: type[Guide], reason: str) -> None:
    status, found = await ask(guide, stream=True)
    error = json.loads(found[-2])["error"] if status == 200 else found["error"]
    assert error["code"] == "guide_failed"
    assert reason in error["message"]
    if status == 200:
        assert found[-1] == "[DONE]"
        ends = [choice["finish_reason"] for line in found[:-2] for choice in json.loads(line)["choices"]]
        assert set(ends) <= {None}, "an answer must not end well before its guide does"


async def test_a_guide_that_keeps_the_contract_is_served() -> None:
    status, body = await ask(played(TOKEN, Scored((ANSWER,)), FINAL))
    assert (status, body["choices"][0]["message"]["content"]) == (200, "hello")


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize(
    "guide", [played(TOKEN, TypeError("a bad day")), played(FINAL, TOKEN), Divides], ids=["raises", "goes on", "deep"]
)
async def test_under_debug_an_error_says_where_in_the_guide_it_comes_from(guide: type[Guide], debug: bool) -> None:
    _, body = await ask(guide, debug)
    found = re.search(r" \(test_contract\.py:(\d+), in run\)$", body["error"]["message"])
    assert (found is not None) == debug
    if found is not None:
        assert any(words in LINES[int(found[1]) - 1] for words in ("raise event", "yield event", "drawn[1 // 0]"))


async def test_beside_a_broken_guide_others_are_served() -> None:
    """In one server, at one time."""
    engine = ScriptedEngine(step_s=0.01)
    state = make_state(engine)
    state.resolver._guides["broken"] = Divides
    body = {"messages": [{"role": "user", "content": "q"}], "seed": 10}
    broken = body | {"alignment": {"guide": "broken", "rewards": ["last_digit"]}}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(state)), base_url="http://test") as client:
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=b) for b in (broken, body) * 5))
    assert [answer.status_code for answer in answers] == [500, 200] * 5
    assert engine.num_running() == state.admission.waiting == 0


@pytest.mark.parametrize("stop_reason", [None, "refused"])
async def test_a_guide_may_say_why_its_answer_ends(stop_reason: str | None) -> None:
    end = Final("content_filter", stop_reason, None, 0, (ANSWER,))
    status, body = await ask(played(TOKEN, end))
    assert status == 200
    (choice,) = body["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("content_filter", stop_reason)
