"""X-Request-Id on every answer, and a line for each request in the log."""

import logging
import re

import httpx
import pytest
from fakes import Faulty, ScriptedEngine, make_state
from fastapi import FastAPI
from raw_http import exchange, post
from serving import serving

from guiderail.server.api.app import create_app
from guiderail.server.api.request_log import MOST_LOGGED, _WithId

PATH = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 4, "seed": 10}
BEST = {"alignment": {"guide": {"name": "best_of_n", "n": 4}, "rewards": [{"name": "last_digit"}]}}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> logging.Handler:
    """What the server would print; `format` has been applied."""
    caplog.set_level(logging.INFO, "guiderail.access")
    caplog.handler.setFormatter(_WithId("%(levelname)s %(name)s: %(message)s"))
    return caplog.handler


def printed(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.text.splitlines() if "guiderail" in line]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/health", None), ("HEAD", "/version", None), ("GET", "/nothing", None), ("PUT", PATH, None),
        ("OPTIONS", PATH, None), ("POST", PATH, BODY), ("POST", PATH, BODY | {"stream": True}), ("POST", PATH, {}),
        ("POST", "/v1/rewards/score", {}), ("GET", "/metrics", None),
    ],
)  # fmt: skip
async def test_a_clients_id_comes_back(method: str, path: str, body: dict[str, object] | None) -> None:
    async with serving(make_state(ScriptedEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        mine = await client.request(method, path, json=body, headers={"X-Request-Id": "mine-1:2/3"})
        ours = await client.request(method, path, json=body)
    assert mine.headers.get_list("x-request-id") == ["mine-1:2/3"]
    assert re.fullmatch("[0-9a-f]{32}", ours.headers["x-request-id"])


@pytest.mark.parametrize("given", ["", " ", "x" * 129, "two words", "caf\xe9", "a\tb"])
async def test_an_id_that_cannot_be_used_is_replaced(given: str) -> None:
    async with serving(make_state(ScriptedEngine())) as url:
        data = f"GET /health HTTP/1.1\r\nX-Request-Id: {given}\r\n\r\n".encode("latin-1")
        answer = await exchange(url, data)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_refused_keys_have_one_too() -> None:
    state = make_state(ScriptedEngine(), api_key=["k"])
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        refused = await client.get("/v1/models", headers={"X-Request-Id": "abc"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (401, "abc")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_line_for_a_request(stream: bool, lines: logging.Handler, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(make_state(ScriptedEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post(PATH, json=BODY | BEST | {"stream": stream}, headers={"X-Request-Id": "abc"})
    (line,) = printed(caplog)
    assert re.fullmatch(
        rf"INFO guiderail.access: POST {PATH} 200 seconds=\d+\.\d{{3}} prompt_tokens=2 completion_tokens=4 "
        r"generated_tokens=16 id=abc",
        line,
    ), line


async def test_a_line_for_what_is_refused(lines: logging.Handler, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(make_state(ScriptedEngine())) as url:
        await exchange(url, post(PATH, b"{", "X-Request-Id: a"))
        await exchange(url, b"GET /%0a%0dINFO HTTP/1.1\r\nX-Request-Id: b\r\n\r\n")
        await exchange(url, b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n")
        await exchange(url, b"nonsense\r\n\r\n")
    found = printed(caplog)
    assert len(found) == 4
    assert f"POST {PATH} 400 seconds=" in found[0]
    assert found[0].endswith(" id=a")
    assert "GET /%0a%0dINFO 404 " in found[1]
    assert len(found[2]) < 400
    assert "refused 400: this is no valid HTTP/1.1 request" in found[3]
    assert re.search(" id=[0-9a-f]{32}$", found[3])


async def test_probes_are_no_news_while_they_succeed(lines: logging.Handler, caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine()
    async with serving(make_state(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        for path in ("/health", "/ready", "/metrics"):
            await client.get(path)
        engine.up = False
        await client.get("/ready")
    (line,) = printed(caplog)
    assert "GET /ready 503" in line


async def test_the_log_of_a_failure_has_the_id(lines: logging.Handler, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ScriptedEngine):
        """Fails in a way that nobody foresees."""

        def generate(self, *args: object, **options: object) -> object:  # type: ignore[override]
            raise ZeroDivisionError("oops")

    async with serving(make_state(Broken(), {"f": Faulty()})) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(PATH, json=BODY, headers={"X-Request-Id": "abc"})
    assert answer.status_code == 500
    assert all(line.endswith(" id=abc") for line in printed(caplog) if line.startswith(("ERROR", "INFO")))


async def test_what_nobody_caught_is_a_500_in_openais_shape(
    lines: logging.Handler, caplog: pytest.LogCaptureFixture
) -> None:
    app: FastAPI = create_app(make_state(ScriptedEngine()))

    @app.get("/broken/{rest}")
    async def broken(rest: str) -> None:
        raise ZeroDivisionError("oops")

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/broken/%0aforged", headers={"X-Request-Id": "abc"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert answer.headers["x-request-id"] == "abc"
    assert not [line for line in caplog.text.splitlines() if line.startswith("forged")]
    assert sum("Traceback" in line for line in caplog.text.splitlines()) == 1


def test_a_record_of_megabytes_is_cut_in_the_middle() -> None:
    record = logging.LogRecord("guiderail", logging.ERROR, "", 0, "begin %s end", ("x" * 5_000_000,), None)
    text = _WithId("%(message)s").format(record)
    assert len(text) < MOST_LOGGED + 100
    assert text.startswith("begin xxx")
    assert text.endswith("xxx end")
    assert "characters cut" in text
    short = logging.LogRecord("guiderail", logging.ERROR, "", 0, "y" * MOST_LOGGED, (), None)
    assert _WithId("%(message)s").format(short) == "y" * MOST_LOGGED
