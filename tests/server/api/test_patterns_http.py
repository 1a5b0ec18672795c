"""Hostile patterns and schemas over HTTP: a 400 that names the field, and nobody else waits. Public bug reports first."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fakes import ScriptedEngine, make_state
from serving import serving

from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.reward import Reward
from guiderail.server.openai_errors import ApiError
from guiderail.server.rewards.rules import JsonSchema, Keywords, Regex, RegexParams

HI = [{"role": "user", "content": "Say something."}]
CHAT, SCORE = "/v1/chat/completions", "/v1/rewards/score"


def rules() -> dict[str, Reward]:
    return {"regex": Regex(), "json_schema": JsonSchema(), "keywords": Keywords()}


def scores_of(reward: dict[str, Any], *answers: str) -> dict[str, Any]:
    return {"inputs": [{"messages": HI, "answers": list(answers)}], "rewards": [reward]}


def formatted(schema: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return {"messages": HI, "max_tokens": 16, "response_format": form}


@pytest.mark.parametrize(
    ("reward", "answers", "values"),
    [
        ({"name": "json_schema", "schema": {}}, ["NaN", "[Infinity]", '{"a": -Infinity}', "1", "nope"], [0, 0, 0, 1, 0]),
        ({"name": "json_schema", "schema": {"multipleOf": 0.1}}, ["1e400", "1e308"], [1, 1]),
        ({"name": "json_schema", "schema": {"multipleOf": 0.1}}, ["[" * 5000 + "]" * 5000, "9" * 6000], [1, 1]),
        ({"name": "json_schema", "schema": {"items": {"$ref": "#"}, "type": "array"}}, ["[[], [[]]]", "[1]"], [1, 0.5]),
    ],
)  # fmt: skip
async def test_answers_get_their_scores(reward: dict[str, Any], answers: list[str], values: list[float]) -> None:
    async with serving(make_state(ScriptedEngine(), rules())) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post(SCORE, json=scores_of(reward, *answers))
    assert response.status_code == 200, response.text
    assert [each["score"] for each in response.json()["data"][0]["answers"]] == values


SELF = {"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}
SLOW = {"name": "regex", "pattern": "(a|aa)+$"}
REFUSED: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("ref-cycle", CHAT, formatted(SELF), "response_format.json_schema.schema", "without an end"),
    ("selfref-schema", SCORE, scores_of({"name": "json_schema", "schema": {"$ref": "#"}}, "1"), "rewards[0]", "without an end"),
    ("regex-repeat", SCORE, scores_of({"name": "regex", "pattern": "a{1500000}"}, "aaa"), "rewards[0]", "written out"),
    ("an enum", CHAT, formatted({"enum": [f"v{i}" for i in range(12_000)]}), "response_format.json_schema.schema", "10000 values"),
    ("properties", CHAT, formatted({"properties": {f"p{i}": {} for i in range(100_000)}}), "response_format.json_schema.schema", "10000 values"),
    ("patterns", CHAT, formatted({"allOf": [{"pattern": f"a{i}"} for i in range(200)]}), "response_format.json_schema.schema", "100 patterns"),
    ("a URL", CHAT, formatted({"$ref": "http://127.0.0.1:9/x"}), "response_format.json_schema.schema", "nothing is looked up"),
    ("a slow one", SCORE, scores_of(SLOW, "a" * 60 + "b"), "rewards", "1 s of processor time"),
    ("parentheses", CHAT, {"messages": HI, "alignment": {"rewards": [{"name": "regex", "pattern": "(" * 1000 + ")" * 1000}]}}, "alignment.rewards[0]", "50 groups"),
    ("no pattern", CHAT, {"messages": HI, "alignment": {"rewards": [{"name": "regex", "pattern": "("}]}}, "alignment.rewards[0]", "not a regular expression"),
    ("two rewards", CHAT, {"messages": HI, "alignment": {"rewards": ["keywords", {"name": "json_schema", "schema": SELF}]}}, "alignment.rewards[1]", "without an end"),
    ("a slow answer", CHAT, {"messages": HI, "seed": 10, "alignment": {"guide": {"name": "best_of_n", "n": 2}, "rewards": [SLOW]}}, "alignment.rewards", "1 s of processor time"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "path", "body", "param", "message"), REFUSED, ids=[each[0] for each in REFUSED])
async def test_it_is_a_400_that_names_the_field(
    name: str, path: str, body: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    if stream and path == SCORE:
        pytest.skip("scores are not streamed")
    engine = ScriptedEngine(lambda seed: ["a" * 60, "b"])
    async with serving(make_state(engine, rules())) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        before = (await client.post(CHAT, json={"messages": HI, "seed": 3})).json()["choices"]
        sent = asyncio.create_task(client.post(path, json=body | ({"stream": True} if stream else {})))
        beats = 0
        while not sent.done():
            assert (await client.get("/health")).status_code == 200
            beats += 1
        response = await sent
        if stream and name == "a slow answer":  # which nobody knew when the stream began
            error = json.loads(response.text.removeprefix("data: ").partition("\n")[0])["error"]
        else:
            assert response.status_code == 400, response.text
            error = response.json()["error"]
        assert (error["param"] or "").startswith(param)
        assert message in error["message"]
        assert (await client.post(CHAT, json={"messages": HI, "seed": 3})).json()["choices"] == before
    assert beats
    assert engine.num_running() == 0


async def test_a_schema_that_fits_is_answered() -> None:
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}}
    async with serving(make_state(ScriptedEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post(CHAT, content=json.dumps(formatted(tree)))
    assert response.status_code == 200, response.text


async def test_patterns_of_the_configuration_are_looked_at_before_requests_come() -> None:
    bad = {"rewards": [{"name": "regex", "pattern": "("}]}
    for settings in ({"alignment": bad}, {"profiles": {"p": bad}}, {"limits": {"required_rewards": bad["rewards"]}}):
        with pytest.raises(ApiError, match="not a regular expression"):
            await make_state(ScriptedEngine(), rules(), **settings).resolver.vet_configured()


async def test_a_request_for_scores_has_its_parameters_checked_once() -> None:
    checked = []

    class Counting(Regex):
        def check(self, params: RegexParams, services: Services) -> None:
            checked.append(params.pattern)

    many = {"inputs": [{"messages": HI, "answers": ["a"]}] * 50, "rewards": [{"name": "regex", "pattern": "a"}]}
    async with (
        serving(make_state(ScriptedEngine(), {"regex": Counting()})) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        assert (await client.post(SCORE, json=many)).status_code == 200
    assert checked == ["a"]
