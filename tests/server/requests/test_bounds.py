"""What a body may have of everything: counted before it is validated, refused by field, limit and setting."""

from typing import Any

import httpx
import pytest
from fakes import ScriptedEngine, make_state
from serving import serving

from guiderail.server.openai_errors import ApiError
from guiderail.server.requests.bounds import check_counts, describe_bounds
from guiderail.server.requests.schemas import ChatRequest, ScoreRequest
from guiderail.server.settings import OperatorLimits

LIMITS = OperatorLimits(
    max_messages=10, max_rewards=3, max_answers=6, max_answer_chars=1000, max_biased_tokens=5, max_candidates=4,
    max_alignment_values=100,
)  # fmt: skip
CONTEXT = 2000
TURN = {"role": "user", "content": "hi"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "hi"}] * 4}


@pytest.mark.parametrize(
    ("body", "field", "setting"),
    [
        ({"messages": [TURN] * 11}, "messages", "max_messages"),
        ({"messages": [1] * 11}, "messages", "max_messages"),
        ({"messages": [PARTS] * 3}, "messages", "max_messages"),
        ({"inputs": [{"messages": [TURN] * 6, "answers": ["a"]}] * 2}, "inputs", "max_messages"),
        ({"inputs": [{"messages": [TURN], "answers": ["a"] * 4}] * 2}, "inputs", "max_answers"),
        ({"inputs": [1] * 7}, "inputs", "max_answers"),
        ({"inputs": [{"answers": ["a", "a" * 1001]}]}, "inputs[0].answers[1]", "max_answer_chars"),
        ({"inputs": [{}, {"answers": [{"text": "a" * 1001}]}]}, "inputs[1].answers[0]", "max_answer_chars"),
        ({"prompt": ["a"] * 5}, "prompt", "max_candidates"),
        ({"prompt": [[1]] * 5}, "prompt", "max_candidates"),
        ({"prompt": [None] * 5}, "prompt", "max_candidates"),
        ({"logit_bias": {str(i): 1 for i in range(6)}}, "logit_bias", "max_biased_tokens"),
        ({"logit_bias": [1] * 6}, "logit_bias", "max_biased_tokens"),
        ({"stop_token_ids": [1] * 6}, "stop_token_ids", "max_biased_tokens"),
        ({"rewards": ["length"] * 4}, "rewards", "max_rewards"),
        ({"alignment": {"rewards": ["length"] * 4}}, "alignment.rewards", "max_rewards"),
        ({"alignment": {"guide": {"tilt": [1] * 101}}}, "alignment", "max_alignment_values"),
        (
            {"alignment": {"guide": {"a": [[1] * 50, {str(i): i for i in range(60)}]}}},
            "alignment",
            "max_alignment_values",
        ),
        ({"combine": {"floors": {str(i): 0 for i in range(101)}}}, "combine", "max_alignment_values"),
        ({"calibration": [1] * 101}, "calibration", "max_alignment_values"),
    ],
)
def test_more_than_the_limit_is_refused_by_field_and_setting(body: dict[str, Any], field: str, setting: str) -> None:
    with pytest.raises(ApiError) as error:
        check_counts(body, LIMITS, CONTEXT)
    assert (error.value.status, error.value.body["error"]["param"]) == (400, field)
    assert f"this server allows at most {getattr(LIMITS, setting)} (limits.{setting})" in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "field"), [([1] * 2000, "prompt"), ([[1], [1] * 2000], "prompt[1]"), ([1, *["a"] * 5000], "prompt")]
)
def test_token_ids_beyond_the_context_are_refused(prompt: list[Any], field: str) -> None:
    with pytest.raises(ApiError, match="the model's context is 2000") as error:
        check_counts({"prompt": prompt}, LIMITS, CONTEXT)
    assert error.value.body["error"] | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": field, "code": "context_length_exceeded",
    }  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [TURN] * 10},
        {"messages": [PARTS] * 2},
        {"messages": "text", "inputs": 1, "rewards": None, "alignment": "profile", "prompt": 5, "logit_bias": True},
        {"inputs": [{"messages": [TURN] * 5, "answers": ["a" * 1000] * 3}] * 2},
        {"inputs": [None, {"answers": {"text": 1}}, {"messages": [[1], {"content": 1}]}]},
        {"prompt": [1] * 1000},
        {"prompt": []},
        {"prompt": "text" * 1000},
        {"logit_bias": {str(i): 1 for i in range(5)}},
        {"alignment": {"guide": {"tilt": [1] * 90}, "rewards": ["length"] * 3}},
    ],
)
def test_what_is_within_the_limits_or_of_a_wrong_type_is_let_through(body: dict[str, Any]) -> None:
    check_counts(body, LIMITS, CONTEXT)


def test_counting_ends_at_the_limit() -> None:
    class Endless(list[object]):
        """A list that counts how often it is looked into."""

        looks = 0

        def __iter__(self) -> Any:
            Endless.looks += 1
            return super().__iter__()

    nested = Endless([Endless([0] * 90)] * 90)
    with pytest.raises(ApiError):
        check_counts({"alignment": {"a": nested}}, LIMITS, CONTEXT)
    assert Endless.looks < 5


def test_the_description_of_a_body_has_the_bounds() -> None:
    chat, scores = ChatRequest.model_json_schema(), ScoreRequest.model_json_schema()
    describe_bounds([chat, scores, *scores["$defs"].values()], LIMITS)
    assert chat["properties"]["messages"]["maxItems"] == 10
    assert chat["properties"]["logit_bias"]["maxProperties"] == 5
    assert scores["properties"]["rewards"]["maxItems"] == 3
    assert scores["$defs"]["ScoreInput"]["properties"]["messages"]["maxItems"] == 10


HUGE: dict[str, tuple[str, dict[str, Any]]] = {
    "messages of numbers": ("chat/completions", {"messages": [1] * 10**6}),
    "many messages": ("chat/completions", {"messages": [TURN] * 10**5}),
    "many parts": ("chat/completions", {"messages": [{"role": "user", "content": [1] * 10**5}]}),
    "token ids": ("completions", {"prompt": [1] * 10**6}),
    "token ids and a word": ("completions", {"prompt": [*[1] * 10**5, "a", *["a"] * 10**5]}),
    "words and a token id": ("completions", {"prompt": ["a", *[1] * 10**5]}),
    "rewards": ("rewards/score", {"inputs": [{"messages": [TURN], "answers": ["a"]}], "rewards": ["length"] * 5000}),
    "logit bias": ("chat/completions", {"messages": [TURN], "logit_bias": {str(i): 1 for i in range(49_000)}}),
    "answers": (
        "rewards/score",
        {"inputs": [{"messages": [TURN], "answers": ["a"] * 1024}] * 200, "rewards": ["length"]},
    ),
    "turns": (
        "rewards/score",
        {"inputs": [{"messages": [TURN] * 1023, "answers": ["a"]}] * 256, "rewards": ["length"]},
    ),
    "unknown fields": ("chat/completions", {"messages": [TURN], **{f"x{i}": 1 for i in range(10**5)}}),
    "words for numbers": ("chat/completions", {"messages": [TURN], "stop_token_ids": ["a"] * 10**5}),
    "stop texts": ("chat/completions", {"messages": [TURN], "stop": [1] * 10**5}),
}


@pytest.mark.parametrize("case", HUGE)
async def test_a_huge_body_is_refused_with_one_short_error(case: str) -> None:
    route, body = HUGE[case]
    engine = ScriptedEngine()
    async with serving(make_state(engine)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        response = await client.post(f"/v1/{route}", json=body)
    assert response.status_code == 400, response.text[:300]
    error = response.json()["error"]
    assert len(response.content) < 3000
    assert error["param"]
    assert engine.peak == 0


async def test_the_limit_of_a_body_is_a_setting() -> None:
    state = make_state(ScriptedEngine(), limits={"max_body_bytes": 5000, "max_body_values": 1000})
    async with serving(state) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        large = await client.post("/v1/chat/completions", json={"messages": [TURN], "user": "a" * 5000})
        many = await client.post("/v1/completions", content=b'{"prompt":[' + b"1," * 995 + b"1]" + b"," * 10)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    assert "5000 bytes (limits.max_body_bytes)" in large.json()["error"]["message"]
    assert (many.status_code, many.json()["error"]["code"]) == (413, "body_too_large")
    assert "limits.max_body_values" in many.json()["error"]["message"]
