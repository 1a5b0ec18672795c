"""Fields: what is known, what is ignored and said, what is refused; our own messages come back; null is absent."""

import json
from typing import Any

import httpx
import pytest
from fakes import ScriptedEngine, make_state

from guiderail.server.api.app import create_app
from guiderail.server.api.routes import parse
from guiderail.server.openai_errors import ApiError
from guiderail.server.requests.schemas import ChatRequest, CompletionRequest, SamplingFields, ScoreRequest
from guiderail.server.requests.wire import MOST_SAID, MOST_UNKNOWN, nearest

HI: Any = [{"role": "user", "content": "Hi"}]
CHAT, TEXT, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/rewards/score"
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI, "max_tokens": 3, "seed": 10},
    TEXT: {"prompt": "Hi", "max_tokens": 3, "seed": 10},
    SCORE: {"inputs": [{"messages": HI, "answers": ["w1 b"]}], "rewards": ["last_digit"]},
}
MODELS = {CHAT: ChatRequest, TEXT: CompletionRequest, SCORE: ScoreRequest}
HEADER = "x-guiderail-ignored-fields"
STATE = make_state(ScriptedEngine())
STRICT_STATE = make_state(ScriptedEngine(), strict_fields=True)


def client(**settings: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(make_state(ScriptedEngine(), **settings)))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def error_of(path: str, **fields: Any) -> dict[str, Any]:
    with pytest.raises(ApiError) as failure:
        parse(STATE, MODELS[path], GOOD[path] | fields)
    assert failure.value.status == 400
    return dict(failure.value.body["error"])


HINTS: list[tuple[str, Any]] = [
    ("store", False), ("metadata", {"a": "b"}), ("metadata", {}), ("tools", []), ("tool_choice", "none"),
    ("tool_choice", "auto"), ("parallel_tool_calls", True), ("parallel_tool_calls", False), ("service_tier", "auto"),
    ("service_tier", "default"), ("best_of", 1), ("echo", False), ("suffix", ""), ("modalities", ["text"]),
    ("prediction", {"type": "content", "content": "Hello"}), ("safety_identifier", "s"), ("prompt_cache_key", "k"),
    ("prompt_cache_retention", "24h"), ("user", "u"), ("verbosity", "medium"), ("reasoning_effort", "none"),
    ("functions", []), ("function_call", "none"), ("include_reasoning", True), ("chat_template_kwargs", {}),
    ("documents", []), ("spaces_between_special_tokens", True), ("use_beam_search", False), ("vllm_xargs", {}),
]  # fmt: skip
UNSERVED: list[tuple[str, Any]] = [
    ("store", True), ("store", 0), ("tools", [{"type": "function"}]), ("tools", {}), ("tool_choice", "required"),
    ("tool_choice", {"type": "function"}), ("service_tier", "flex"), ("service_tier", []), ("best_of", 4),
    ("best_of", True), ("echo", True), ("suffix", "x"), ("modalities", ["audio"]), ("modalities", ["text", "audio"]),
    ("audio", {}), ("verbosity", "low"), ("reasoning_effort", "high"), ("web_search_options", {}), ("functions", [{}]),
    ("function_call", {"name": "f"}), ("chat_template", "x"), ("chat_template_kwargs", {"enable_thinking": False}),
    ("structured_outputs", {"regex": "a"}), ("guided_choice", ["a"]), ("prompt_logprobs", 1), ("cache_salt", "s"),
    ("thinking_token_budget", 5), ("use_beam_search", True), ("logits_processors", ["f"]), ("kv_transfer_params", {"a": 1}),
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_value_that_asks_for_what_happens_anyway_is_taken(path: str) -> None:
    async with client(strict_fields=True) as http:
        plain = (await http.post(path, json=GOOD[path])).json()["choices"]
        for name, value in HINTS + [(name, None) for name, _ in UNSERVED]:
            answer = await http.post(path, json=GOOD[path] | {name: value})
            assert answer.status_code == 200, (name, answer.text)
            assert answer.json()["choices"] == plain
            assert HEADER not in answer.headers


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("name", "value"), UNSERVED, ids=str)
def test_what_would_change_the_answer_is_refused_by_name(path: str, name: str, value: Any) -> None:
    error = error_of(path, **{name: value})
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert error["message"].startswith(f"'{name}': ")


@pytest.mark.parametrize(
    ("path", "name", "meant"),
    [
        (CHAT, "aligment", "alignment"), (CHAT, "max_token", "max_tokens"), (CHAT, "temprature", "temperature"),
        (CHAT, "Temperature", "temperature"), (CHAT, "mesages", "messages"), (CHAT, "N", "n"), (CHAT, "top-p", "top_p"),
        (CHAT, "tool", "tools"), (CHAT, "maxx_tokenss", "max_tokens"), (TEXT, "promt", "prompt"), (TEXT, "stops", "stop"),
        (SCORE, "reward", "rewards"), (SCORE, "input", "inputs"),
    ],
)  # fmt: skip
def test_what_is_nearly_a_field_is_refused_with_the_field(path: str, name: str, meant: str) -> None:
    error = error_of(path, **{name: 1})
    assert (error["param"], error["code"]) == (name, "unknown_parameter")
    assert f"did you mean '{meant}'?" in error["message"]


def test_a_misspelt_field_of_a_part_is_named_by_its_path() -> None:
    assert error_of(CHAT, messages=[{"role": "user", "contents": "x"}])["param"] == "messages[0].contents"
    assert (
        error_of(CHAT, stream=True, stream_options={"include_usages": True})["param"] == "stream_options.include_usages"
    )


@pytest.mark.parametrize("name", ["x", "id", "foo", "chat_id", "extra_body", "maxxx_tokensss"])
def test_what_is_far_from_every_field_is_near_none(name: str) -> None:
    assert nearest(name, SamplingFields.model_fields) is None


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_field_is_ignored_and_said(path: str, stream: bool) -> None:
    more: dict[str, Any] = {"chat_id": "c", "x\r\nSet-Cookie: é": 1, "nothing": None}
    if stream and path != SCORE:
        more["stream"] = True
    async with client() as http:
        answer = await http.post(path, json=GOOD[path] | more)
    assert answer.status_code == 200, answer.text
    assert answer.headers[HEADER] == "chat_id, x\\r\\nSet-Cookie: \\xe9"
    assert "set-cookie" not in answer.headers
    assert "field 'chat_id' is unknown and was ignored" in answer.text
    assert "nothing" not in answer.text


async def test_unknown_fields_of_parts_are_said_and_not_without_end() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi", "lang": "en"}], "id": 5}]
    async with client() as http:
        answer = await http.post(CHAT, json=GOOD[CHAT] | {"messages": messages})
        assert answer.headers[HEADER] == "messages[0].id, messages[0].content[0].lang"
        many = await http.post(CHAT, json=GOOD[CHAT] | {f"unknown_{i}_{'x' * 500}": i for i in range(MOST_UNKNOWN)})
        endless = await http.post(CHAT, json=GOOD[CHAT] | {f"unknown_{i}": i for i in range(MOST_UNKNOWN + 1)})
    assert (endless.status_code, endless.json()["error"]["param"]) == (400, "unknown_0")
    assert len(many.headers[HEADER].split(", ")) == MOST_SAID
    assert len(many.json()["alignment"]["warnings"]) == MOST_SAID


@pytest.mark.parametrize("path", GOOD)
async def test_strict_fields_refuses_what_nobody_knows(path: str) -> None:
    async with client(strict_fields=True) as http:
        answer = await http.post(path, json=GOOD[path] | {"chat_id": "c"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter")
        assert "allowed here: " in answer.json()["error"]["message"]
        assert (await http.post(path, json=GOOD[path] | {"chat_id": None})).status_code == 200


async def test_inside_alignment_everything_is_strict() -> None:
    async with client() as http:
        for alignment, param in (
            ({"chat_id": 1}, "alignment.chat_id"),
            ({"guide": {"name": "best_of_n", "top-k": 3}, "rewards": ["last_digit"]}, "alignment.guide.top-k"),
            ({"rewards": [{"name": "last_digit", "chat_id": 1}]}, "alignment.rewards[0].chat_id"),
        ):
            error = (await http.post(CHAT, json=GOOD[CHAT] | {"alignment": alignment})).json()["error"]
            assert (error["param"], error["code"]) == (param, "unknown_parameter")


async def test_what_we_send_as_a_message_is_taken_as_one() -> None:
    async with client() as http:
        answer = (await http.post(CHAT, json=GOOD[CHAT])).json()
        message = answer["choices"][0]["message"]
        again = await http.post(CHAT, json=GOOD[CHAT] | {"messages": [*HI, message, *HI]})
        plain = await http.post(CHAT, json=GOOD[CHAT] | {"messages": [*HI, _plain(message), *HI]})
    assert again.status_code == 200, again.text
    assert HEADER not in again.headers
    assert again.json()["usage"] == plain.json()["usage"]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": message["content"]}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"content": "Hello!", "refusal": None}, "Hello!"),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": [{"type": "text", "text": "A", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "B"}]}, "AB"),
        (
            {
                "content": "Hi", "refusal": None, "annotations": [], "audio": None, "function_call": None,
                "tool_calls": None, "name": None, "parsed": None, "reasoning": None, "reasoning_content": "Hm.",
                "alignment": None,
            },
            "Hi",
        ),
        ({"content": "Hi", "tool_calls": [], "annotations": [{"type": "url_citation"}], "reasoning": "Hm."}, "Hi"),
    ],
    ids=str,
)  # fmt: skip
def test_an_assistants_message_is_taken_as_servers_and_clients_write_it(more: dict[str, Any], text: str) -> None:
    body = {"messages": [*HI, {"role": "assistant"} | more, *HI]}
    request = parse(STRICT_STATE, ChatRequest, body)
    assert request.messages[1].message.content == text


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "user", "content": None}, "messages[0].content", "missing_required_parameter"),
        ({"role": "user"}, "messages[0].content", "missing_required_parameter"),
        ({"role": "system", "refusal": "x"}, "messages[0].content", "missing_required_parameter"),
        ({"role": None, "content": "x"}, "messages[0].role", "missing_required_parameter"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls", "unsupported_parameter"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages[0].audio", "unsupported_parameter"),
        ({"role": "assistant", "function_call": {}}, "messages[0].function_call", "unsupported_parameter"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0].type", "invalid_value"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "missing_required_parameter"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "messages[0].content[0].text", "missing_required_parameter"),
    ],
    ids=str,
)  # fmt: skip
def test_a_message_that_says_nothing_is_refused(message: dict[str, Any], param: str, code: str) -> None:
    error = error_of(CHAT, messages=[message])
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("path", GOOD)
async def test_null_is_absent_in_every_field(path: str) -> None:
    model = MODELS[path]
    nulls: dict[str, Any] = dict.fromkeys(info.alias or name for name, info in model.model_fields.items())
    async with client(strict_fields=True) as http:
        plain = await http.post(path, json=GOOD[path])
        answer = await http.post(path, json=nulls | GOOD[path])
    assert answer.status_code == 200, answer.text
    kept = ("choices", "usage", "data")
    assert [answer.json().get(key) for key in kept] == [plain.json().get(key) for key in kept]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_token_ids_come_if_asked_for_whole_and_streamed(path: str) -> None:
    body = GOOD[path] | {"return_token_ids": True, "n": 2}
    async with client() as http:
        whole = (await http.post(path, json=body)).json()
        text = (await http.post(path, json=body | {"stream": True})).text
        assert "token_ids" not in (await http.post(path, json=GOOD[path])).text
    chunks = [_event(line) for line in text.split("\n\n")[:-2]]
    prompts = [each["prompt_token_ids"] for each in ([whole] if path == CHAT else whole["choices"])]
    assert {len(prompt) for prompt in prompts} == {whole["usage"]["prompt_tokens"]}
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert choice["token_ids"] == [token for c in mine for token in c.get("token_ids", ())] == [0, 1, 2]
    streamed = [each for chunk in chunks for each in ([chunk] if path == CHAT else chunk["choices"])]
    assert [each["prompt_token_ids"] for each in streamed if "prompt_token_ids" in each] == prompts


@pytest.mark.parametrize(("keep", "tokens"), [(1, 1), (3, 3), (500, 500), (None, None), (-1, 509)])
async def test_a_prompt_is_cut_at_its_beginning_if_asked_for(keep: int | None, tokens: int | None) -> None:
    prompt = "".join(chr(97 + i % 26) for i in range(600))
    async with client() as http:
        answer = await http.post(
            TEXT, json={"prompt": prompt, "max_tokens": 3, "truncate_prompt_tokens": keep, "return_token_ids": True}
        )
    if tokens is None:
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        return
    assert answer.json()["choices"][0]["prompt_token_ids"] == [ord(c) for c in prompt[-tokens:]]
    assert error_of(TEXT, truncate_prompt_tokens=0)["param"] == "truncate_prompt_tokens"


async def test_usage_comes_with_every_chunk_if_asked_for() -> None:
    for options, chunks in (
        ({"continuous_usage_stats": True}, "all"),
        ({"include_usage": True, "continuous_usage_stats": True}, "all"),
        ({"include_usage": True, "continuous_usage_stats": False, "include_obfuscation": False}, "last"),
        ({"include_obfuscation": True}, "none"),
    ):
        async with client() as http:
            body = GOOD[CHAT] | {"n": 2, "stream": True, "stream_options": options}
            whole = (await http.post(CHAT, json=GOOD[CHAT] | {"n": 2})).json()["usage"]
            events = [_event(line) for line in (await http.post(CHAT, json=body)).text.split("\n\n")[:-2]]
        usages = [each.get("usage") for each in events]
        match chunks:
            case "all":
                counts = [usage["completion_tokens"] for usage in usages]
                assert counts == sorted(counts)
                assert counts[0] == 0
                assert len(set(counts)) > 2
                assert {usage["prompt_tokens"] for usage in usages} == {whole["prompt_tokens"]}
                assert usages[-1] == whole
            case "last":
                assert usages[:-1] == [None] * (len(events) - 1)
                assert usages[-1] == whole
            case _:
                assert not any("usage" in each for each in events)


def _event(line: str) -> dict[str, Any]:
    return dict(json.loads(line.removeprefix("data: ")))
