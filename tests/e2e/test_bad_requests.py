"""Each kind of bad request gets its own error, and a good request beside it is not hurt."""

import asyncio
from typing import Any

import httpx
import pytest
from serving import Live

HI: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}

CASES: list[tuple[str, Any, int, str | None, str | None]] = [
    (CHAT, b"{", 400, None, "invalid_json"),
    (CHAT, b"[]", 400, None, "invalid_json"),
    (CHAT, {}, 400, "messages", "missing_required_parameter"),
    (CHAT, {"messages": []}, 400, "messages", "invalid_value"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_required_parameter"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].type", "invalid_value"),
    (CHAT, {"messages": HI, "temprature": 1}, 400, "temprature", "unknown_parameter"),
    (CHAT, {"messages": HI, "temperature": -1}, 400, "temperature", "invalid_value"),
    (CHAT, {"messages": HI, "temperature": "warm"}, 400, "temperature", "invalid_value"),
    (CHAT, {"messages": HI, "top_p": 0}, 400, "top_p", "invalid_value"),
    (CHAT, {"messages": HI, "n": 0}, 400, "n", "invalid_value"),
    (CHAT, {"messages": HI, "n": 9}, 400, "n", "invalid_value"),
    (CHAT, {"messages": HI, "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    (CHAT, {"messages": HI, "max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "invalid_value"),
    (CHAT, {"messages": HI, "max_tokens": 100_000}, 400, "max_tokens", "context_length_exceeded"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "messages", "context_length_exceeded"),
    (CHAT, {"messages": HI, "stop": [""]}, 400, "stop[0]", "invalid_value"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 51}, 400, "top_logprobs", "invalid_value"),
    (CHAT, {"messages": HI, "top_logprobs": 5}, 400, "top_logprobs", "invalid_value"),
    (CHAT, {"messages": HI, "logit_bias": {"99999999": 1}}, 400, "logit_bias", "invalid_value"),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    (CHAT, {"messages": HI, "continue_final_message": True}, 400, "continue_final_message", "invalid_value"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "invalid_value"),
    (CHAT, {"messages": HI, "response_format": SCHEMA}, 400, "response_format.json_schema.schema", "invalid_value"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}, "alignment": {"guide": "shortest"}}, 400, "response_format", "invalid_value"),
    (CHAT, {"messages": HI, "model": "gpt-4"}, 404, "model", "model_not_found"),
    (CHAT, {"messages": HI, "model": "smollm2-135m-instruct@nope"}, 404, "model", "model_not_found"),
    (CHAT, {"messages": HI, "alignment": "nope"}, 400, "alignment", "invalid_value"),
    (CHAT, {"messages": HI, "alignment": {"guide": {"name": "best_of_n", "n": 65}, "rewards": ["length"]}}, 400, "alignment.guide", "invalid_value"),
    (CHAT, {"messages": HI, "alignment": {"rewards": [{"name": "regex", "pattern": "("}]}}, 400, "alignment.rewards[0]", "invalid_value"),
    (CHAT, {"messages": HI, "alignment": {"rewards": [{"name": "implicit", "adapter": "nope"}]}}, 400, "alignment.rewards[0]", "invalid_value"),
    (CHAT, {"messages": HI, "alignment": {"budget": {"deadline_s": 121}}}, 400, "alignment.budget.deadline_s", "invalid_value"),
    (TEXT, {}, 400, "prompt", "missing_required_parameter"),
    (TEXT, {"prompt": ""}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": [1, 10**7]}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": "x", "echo": True}, 400, "echo", "unsupported_parameter"),
    (TEXT, {"prompt": "x", "best_of": 4}, 400, "best_of", "unsupported_parameter"),
    ("/v1/nothing", {}, 404, None, "not_found"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), CASES)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_request(
    live: Live, path: str, body: Any, status: int, param: str | None, code: str, stream: bool
) -> None:
    if stream:
        if isinstance(body, bytes) or "stream_options" in body:
            pytest.skip("the body cannot ask for a stream")
        body = body | {"stream": True}
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as http:
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        response = await http.post(path, **content)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    if param is not None:
        assert (
            param.split("[")[0].split(".")[-1] in error["message"]
            or param in error["message"]
            or code != "unknown_parameter"
        )


async def test_wrong_method_has_the_same_shape(live: Live) -> None:
    async with httpx.AsyncClient(base_url=live.url) as http:
        response = await http.get(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")


async def test_bad_requests_do_not_disturb_a_good_one(live: Live) -> None:
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as http:
        good = asyncio.create_task(
            http.post(CHAT, json={"messages": HI, "max_tokens": 40, "seed": 1, "ignore_eos": True})
        )
        for path, body, status, _, _ in CASES:
            content = {"content": body} if isinstance(body, bytes) else {"json": body}
            assert (await http.post(path, **content)).status_code == status
        answer = await good
    assert answer.json()["usage"]["completion_tokens"] == 40
