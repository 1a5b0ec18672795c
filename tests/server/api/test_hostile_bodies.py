"""Whatever a client sends: each route answers 400 in OpenAI's shape, in JSON, and goes on serving."""

import json
from typing import Any

import httpx
import pytest
from fakes import ScriptedEngine, make_state

from guiderail.server.api.app import create_app
from guiderail.server.openai_errors import MAX_MESSAGE, MAX_PARAM
from guiderail.server.rewards.rules import JsonSchema, Length
from guiderail.server.workers import SMALL

HI: Any = [{"role": "user", "content": "Hi"}]
CHAT, TEXT, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/rewards/score"
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI, "max_tokens": 3, "seed": 10},
    TEXT: {"prompt": "Hi", "max_tokens": 3, "seed": 10},
    SCORE: {"inputs": [{"messages": HI, "answers": ["a b"]}], "rewards": ["length"]},
}


def client(**settings: Any) -> httpx.AsyncClient:
    state = make_state(ScriptedEngine(), {"length": Length(), "json_schema": JsonSchema()}, **settings)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=create_app(state)), base_url="http://test")


def with_text(path: str, key: str, text: str) -> bytes:
    """A good body with a further key, whose value is JSON text as it stands."""
    return json.dumps(GOOD[path])[:-1].encode() + f', "{key}": {text}}}'.encode()


DEEP = "[" * 20000 + "]" * 20000
HOSTILE: list[tuple[str, str | None]] = [
    (DEEP, None),
    ("[" * 300 + "]" * 300, "metadata[0][0][0][0][0]"),
    ('{"a":' * 20000 + "1" + "}" * 20000, None),
    ("NaN", "metadata"),
    ('{"x": -Infinity}', "metadata.x"),
    ('{"x": 1e999}', "metadata.x"),
    ('{"x": [1%s]}' % ("0" * 400), "metadata.x[0]"),
    ('{"x": 1%s}' % ("0" * 6000), "metadata.x"),
    ('{"x": "caf\\u00e9 \\ud83d"}', "metadata.x"),
    ('{"x": "\\udc00"}', "metadata.x"),
    ('{"\\ud83d": 1}', "metadata"),
    ('{"x": 1, "x": 2}', "metadata"),
    ('"\udcff"', None),  # bytes that are no UTF-8
    ("", None),
    ("nul", None),
]


def refused(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/json"
    (key, error), *more = response.json().items()
    assert (key, more, set(error)) == ("error", [], {"message", "type", "param", "code"})
    assert error["type"] == "invalid_request_error"
    return dict(error)


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(("text", "param"), HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_json_is_a_400_with_its_path(path: str, text: str, param: str | None) -> None:
    body = json.dumps(GOOD[path])[:-1].encode() + b', "metadata": ' + text.encode("utf-8", "surrogateescape") + b"}"
    async with client() as http:
        assert refused(await http.post(path, content=body))["param"] == param
        assert (await http.post(path, json=GOOD[path])).status_code == 200


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"1", b'"x"', b"\xff\xfe", DEEP.encode(), b"[" * 10**6])
async def test_what_is_no_object_is_a_400(path: str, body: bytes) -> None:
    async with client() as http:
        assert refused(await http.post(path, content=body))["code"] == "invalid_json"


CASES: list[tuple[str, str, str, int, str]] = [
    (CHAT, "model", '"\\ud83d"', 400, "model"),
    (TEXT, "model", '"\\ud83d"', 400, "model"),
    (CHAT, "model", '"%s"' % ("m" * 10**6), 404, "model"),
    (CHAT, "alignment", '"%s"' % ("p" * 10**6), 400, "alignment"),
    (CHAT, "top_k", str(2**64), 400, "top_k"),
    (CHAT, "top_k", str(2**31), 400, "top_k"),
    (CHAT, "n", str(10**30), 400, "n"),
    (CHAT, "seed", str(2**63), 400, "seed"),
    (CHAT, "max_tokens", str(2**63), 400, "max_tokens"),
    (CHAT, "stop_token_ids", f"[{2**64}]", 400, "stop_token_ids[0]"),
    (CHAT, "logit_bias", '{"%s": 1}' % ("9" * 30), 400, "logit_bias"),
    (CHAT, "logit_bias", '{"%s": 1}' % ("9" * 5000), 400, "logit_bias"),
    (CHAT, "temperature", "2.5", 400, "temperature"),
    (CHAT, "repetition_penalty", "5e-324", 400, "repetition_penalty"),
    (CHAT, "%s" % ("k" * 10**5 + "ey"), "1", 200, ""),
    (SCORE, "rewards", '[{"name": "length", "weight": 1%s}]' % ("0" * 400), 400, "rewards[0].weight"),
    (SCORE, "temperature", "1e308", 400, "temperature"),
]


@pytest.mark.parametrize(("path", "key", "text", "status", "param"), CASES, ids=[f"{c[1][:20]}-{c[4]}" for c in CASES])
async def test_values_beyond_all_bounds_name_their_field(
    path: str, key: str, text: str, status: int, param: str
) -> None:
    body = {name: value for name, value in GOOD[path].items() if name != key}
    content = json.dumps(body)[:-1] + f', "{key}": {text}}}'
    async with client() as http:
        answer = await http.post(path, content=content)
    assert answer.status_code == status, answer.text[:300]
    if status == 200:
        return
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert len(error["message"]) <= MAX_MESSAGE + 3
    assert len(error["param"]) <= MAX_PARAM + 3


@pytest.mark.parametrize(
    ("alignment", "param"),
    [
        ({"guide": name}, "alignment.guide")
        for name in ({}, [], 5, True, {"name": []}, {"name": {}}, {"name": None}, {"name": 5}, "x" * 10**5, {"name": ""})
    ]
    + [({part: {"name": ["x"]}}, f"alignment.{part}.name") for part in ("guide", "prompter", "combine", "select")]
    + [({part: {"name": "\x00nope"}}, f"alignment.{part}.name") for part in ("guide", "prompter", "combine", "select")]
    + [({"rewards": [name]}, "alignment.rewards[0]") for name in ({}, [], 5, {"name": []}, {"name": {"a": []}}, "nope")]
    + [({"rewards": rewards}, "alignment.rewards") for rewards in ({}, 0, "", False, "length", {"name": "length"})]
    + [
        ({"rewards": [{"name": "length", "transform": transform}]}, "alignment.rewards[0].transform")
        for transform in ({}, 5, [[]], [{}], {"name": []}, {"name": {}}, ["nope"], [5], "x" * 10**5)
    ]
    + [({"rewards": [{"name": "length", "label": label}]}, "alignment.rewards[0].label") for label in ("", [], {}, 5)]
    + [({"profile": profile}, "alignment") for profile in ([], {}, 5, "nope", "")]
    + [({"budget": budget}, "alignment.budget") for budget in (0, "", False, [], {"deadline_s": -1}, {"deadline_s": 1e300})]
    + [({"calibration": calibration}, "alignment.calibration") for calibration in (0, [], "auto", {"source": []}, {"n": {}})]
    + [({"return_candidates": flag}, "alignment.return_candidates") for flag in (0, "yes", [], {})],
)  # fmt: skip
async def test_a_look_up_takes_any_json(alignment: Any, param: str) -> None:
    async with client() as http:
        error = refused(await http.post(CHAT, json=GOOD[CHAT] | {"alignment": alignment}))
    assert error["param"].startswith(param)


async def test_a_large_body_is_read_like_a_small_one() -> None:
    long = "x" * SMALL
    async with client() as http:
        body = GOOD[SCORE] | {"inputs": [{"messages": HI, "answers": [long]}]}
        assert (await http.post(SCORE, json=body)).status_code == 200
        error = refused(await http.post(CHAT, content=with_text(CHAT, "user", f'"{long}\\ud83d"')))
    assert error["param"] == "user"


async def test_nan_is_no_json_to_the_json_schema_reward() -> None:
    answers = ["NaN", "[Infinity]", '{"a": -Infinity}', "1", "nope", "1e400", "[" * 10**5]
    body = {"inputs": [{"messages": HI, "answers": answers}], "rewards": [{"name": "json_schema", "schema": {}}]}
    async with client() as http:
        data = (await http.post(SCORE, json=body)).json()["data"]
    assert [each["score"] for each in data[0]["answers"]] == [0, 0, 0, 1, 0, 1, 0]
