"""Cross-origin requests of browsers: none without --allowed-origin, preflights without a key, headers exposed."""

import httpx
import pytest
from fakes import ScriptedEngine, make_state
from pydantic import ValidationError
from serving import serving

from guiderail.server.settings import Settings

ORIGIN = "http://localhost:3000"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}
BODY = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 2}


async def test_without_the_flag_there_is_none() -> None:
    async with serving(make_state(ScriptedEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        preflight = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        plain = await client.get("/v1/models", headers={"Origin": ORIGIN})
    assert (preflight.status_code, plain.status_code) == (204, 200)
    for each in (preflight, plain):
        assert not [name for name in each.headers if name.startswith("access-control")]


@pytest.mark.parametrize("allowed", [[ORIGIN], ["https://other", ORIGIN], ["*"]])
async def test_a_page_of_an_allowed_origin(allowed: list[str]) -> None:
    state = make_state(ScriptedEngine(), allowed_origin=allowed, api_key=["k"])
    known = "*" if "*" in allowed else ORIGIN
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        preflight = await client.options("/v1/chat/completions", headers=PREFLIGHT)  # browsers send no key with it
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == known
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
        key = {"Origin": ORIGIN, "Authorization": "Bearer k"}
        answer = await client.post("/v1/chat/completions", json=BODY, headers=key)
        refused = await client.post("/v1/chat/completions", json=BODY, headers={"Origin": ORIGIN})
        wrong = await client.post("/v1/models", headers=key)
    assert (answer.status_code, refused.status_code, wrong.status_code) == (200, 401, 405)
    for each in (answer, refused, wrong):  # a page reads what was wrong, too
        assert each.headers["access-control-allow-origin"] == known
        exposed = each.headers["access-control-expose-headers"].lower().split(", ")
        assert "x-request-id" in exposed
        assert "content-length" not in exposed
    assert "allow" in wrong.headers["access-control-expose-headers"].lower()


async def test_another_origin_is_refused_by_name() -> None:
    state = make_state(ScriptedEngine(), allowed_origin=["https://mine.example"])
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        preflight = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        answer = await client.post("/v1/chat/completions", json=BODY, headers={"Origin": ORIGIN})
    assert preflight.status_code == 403
    assert ORIGIN in preflight.json()["error"]["message"]
    for each in (preflight, answer):
        assert "access-control-allow-origin" not in each.headers
        assert "Origin" in each.headers["vary"]


@pytest.mark.parametrize("origin", ["localhost:3000", "http://a/", "http://a/b", "http://", "", "http://a b"])
def test_an_origin_that_is_none_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ValidationError, match=r"is no origin: write scheme://host\[:port\]"):
        Settings(allowed_origin=[origin])
