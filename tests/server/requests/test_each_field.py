"""Each field of full bodies in turn becomes each of many hostile values: 200, or an error of the client's, by its path."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fakes import ScriptedEngine, make_state
from tabular_server import tabular_state

from guiderail.server.api.app import create_app
from guiderail.server.rewards.rules import JsonSchema, Keywords, Length, Regex
from guiderail.server.settings import OperatorLimits

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 1e308, -1e308, 5e-324, 0.5, "", "x", "\x00", "é" * 50, [], {}, [[]],
    [None], [1], [{}], {"name": None}, {"name": []}, {"": 1}, ["x", "x"], {"a": {"b": None}}, "<|im_end|>", [0.1], {"1": "x"},
]  # fmt: skip
MESSAGES = [
    {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]},
    {"role": "assistant", "content": "a", "refusal": None}, {"role": "user", "content": "z"},
]  # fmt: skip
SAMPLING = {
    "model": "fake", "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 1, "stop": ["zz"],
    "stop_token_ids": [3], "include_stop_str_in_output": False, "max_tokens": 3, "min_tokens": 0, "ignore_eos": False,
    "skip_special_tokens": True, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
    "logit_bias": {"2": 1.0}, "response_format": {"type": "text"}, "stream": False, "user": "u", "priority": 0,
    "metadata": {}, "store": False, "bad_words": ["q"], "allowed_token_ids": [1, 2, 3], "truncate_prompt_tokens": 5,
    "return_token_ids": True,
}  # fmt: skip
CHAIN = [
    {"name": "clip", "low": 0.0, "high": 1.0},
    {"name": "log_sigmoid", "reference": {"value": 0.0}, "temperature": 1.0},
]
ALIGNMENT = {
    "prompter": {"name": "template"}, "combine": {"name": "sum"}, "select": {"name": "argmax"},
    "rewards": [
        {"name": "a", "label": "a", "weight": 1.0, "transform": CHAIN},
        {"name": "b", "weight": 0, "transform": {"name": "standardize", "mean": 0.0, "std": 1.0}},
    ],
    "calibration": {"source": "auto", "n": 2}, "budget": {"deadline_s": 600.0, "max_tokens_generated": 10000},
    "return_candidates": True,
}  # fmt: skip
URIAL = {"name": "urial", "style": "brief", "examples": [{"query": "q", "answer": "a"}]}
SYSTEM = {"name": "system_message", "preferences": ["x"], "role": "r"}
GUIDES: list[dict[str, Any]] = [
    {"name": "best_of_n", "n": 2},
    {"name": "speculative_rejection", "n": 2, "alpha": 0.5, "segments": 2, "keep": 1},
    {"name": "controlled_decoding", "k": 2, "block": 2, "rollouts": 1, "horizon": 1},
    {
        "name": "transfer_q", "top_k": 2, "block": 1, "lookahead": 1, "rollouts": 2, "temperature": 1.0, "alpha": 1.0,
        "baseline": {"model": "adapter", "system": "s", "prompter": URIAL}, "baseline_reward": "b", "beta": 1.0,
        "min_ess": 0.3, "reuse": True,
    },
    {"name": "args", "top_k": 2, "w": 1.0},
    {
        "name": "deal", "beams": 2, "top_k": 2, "lookahead": 1, "sampled": False, "weight": 1.0, "threshold": 0.0,
        "length_penalty": 0.0, "instruction": "i",
    },
    {
        "name": "logit_mix", "plausibility": 0.1, "tilt": [{"token": 2, "value": 1.0}],
        "policies": [{"model": "adapter", "system": "s", "prompter": SYSTEM, "weight": 1.0}],
    },
]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"minimum": 0.0, "pattern": "a", "enum": [1]}}, "required": ["a"]}
SCORE = {
    "inputs": [{"messages": MESSAGES[:2], "answers": ["x", {"text": "y", "partial": True}]}],
    "rewards": [
        {"name": "length", "target": 5, "unit": "words", "weight": 1.0, "label": "l"},
        {"name": "regex", "pattern": "a", "mode": "search", "ignore_case": False},
        {"name": "keywords", "words": ["x"], "match": "word", "case_sensitive": False},
        {"name": "json_schema", "schema": SCHEMA},
    ],
    "combine": {"name": "sum"}, "calibration": {"source": "auto", "n": 2}, "max_tokens": 2, "temperature": 1.0, "seed": 1,
}  # fmt: skip
CHAT_PATH, TEXT_PATH, SCORE_PATH = "/v1/chat/completions", "/v1/completions", "/v1/rewards/score"
CHAT = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1, "add_generation_prompt": True}
STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT_PATH, SAMPLING | CHAT | {"max_completion_tokens": 3, "continue_final_message": False}),
    "stream": (CHAT_PATH, {"messages": MESSAGES, "max_tokens": 2, **STREAM}),
    "text": (TEXT_PATH, SAMPLING | {"prompt": "q", "logprobs": 1}),
    "tokens": (TEXT_PATH, {"prompt": [[1, 2], [3]], "max_tokens": 2}),
    "score": (SCORE_PATH, SCORE),
    **{
        guide["name"]: (CHAT_PATH, {"messages": MESSAGES, "max_tokens": 2, "seed": 1, "alignment": ALIGNMENT | {"guide": guide}})
        for guide in GUIDES
    },
}  # fmt: skip


def paths(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all values within JSON."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(item, (*path, key))


def variants(body: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any, dict[str, Any]]]:
    """(path, value, the body with that value there)."""
    for path in paths(body):
        for value in VALUES:
            changed: Any = copy.deepcopy(body)
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            yield path, value, changed


def told(answer: httpx.Response) -> list[dict[str, Any]]:
    """The errors in an answer, which for a stream may be events."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
        return [event["error"] for event in events if "error" in event]
    return [answer.json()["error"]] if "error" in answer.json() else []


async def check(name: str, every: int) -> None:
    """Send every `every`-th variant of a body."""
    path, body = BODIES[name]
    rules = {"length": Length(), "keywords": Keywords(), "regex": Regex(), "json_schema": JsonSchema()}
    scripted = make_state(ScriptedEngine(), rules)
    state = scripted if path == SCORE_PATH else tabular_state(end=0.3, limits=OperatorLimits(max_candidates=16))
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
        plain = await client.post(path, json=body)
        assert plain.status_code == 200, plain.text
        for at, value, changed in list(variants(body))[::every]:
            answer = await client.post(path, json=changed)
            errors = told(answer)
            for error in errors:
                assert set(error) == {"message", "type", "param", "code"}
                assert error["param"], (at, value, error)
            late = value == 5e-324 and at[-1] == "deadline_s"  # a deadline that nobody can keep
            assert answer.status_code in (200, 400, 404) or (answer.status_code == 504 and late), (
                at,
                value,
                answer.text,
            )
            assert late or all(error["type"] == "invalid_request_error" for error in errors), (at, value, errors)
        if "seed" in body:
            kept = ("choices", "data")
            again = (await client.post(path, json=body)).json()
            assert [again.get(key) for key in kept] == [plain.json().get(key) for key in kept]


@pytest.mark.parametrize("name", BODIES)
async def test_no_value_of_a_field_breaks_anything(name: str) -> None:
    await check(name, 13)


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
async def test_no_value_of_any_field_breaks_anything(name: str) -> None:
    await check(name, 1)
