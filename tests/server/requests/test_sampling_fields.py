"""Every sampling field with every guide: kept, or refused by name; never ignored."""

from dataclasses import fields
from typing import Any

import httpx
import pytest
from tabular_server import tabular_state

from guiderail.guides.core.types import SamplingSpec
from guiderail.server.api.app import create_app
from guiderail.server.requests.hints import Hints
from guiderail.server.requests.sampling_fields import sampling_spec
from guiderail.server.requests.schemas import ChatRequest, CompletionRequest, SamplingFields

# A value that is not the default, and one that says the default again.
FIELDS: dict[str, tuple[Any, Any]] = {
    "temperature": (0.7, 1.0), "top_p": (0.9, 1), "top_k": (3, -1), "min_p": (0.1, 0), "stop": ("ab", []),
    "stop_token_ids": ([2], []), "include_stop_str_in_output": (True, False), "min_tokens": (2, 0),
    "ignore_eos": (True, False), "skip_special_tokens": (False, True), "presence_penalty": (0.5, 0),
    "frequency_penalty": (0.5, 0.0), "repetition_penalty": (1.1, 1), "logit_bias": ({"2": 1.5}, {}),
    "response_format": ({"type": "json_object"}, {"type": "text"}), "seed": (5, None), "n": (2, 1),
    "bad_words": (["ab"], []), "allowed_token_ids": ([2, 3], None), "truncate_prompt_tokens": (3, None),
    "return_token_ids": (True, False), "max_tokens": (5, 6), "logprobs": (True, False), "top_logprobs": (2, 0), "priority": (1, 0),
}  # fmt: skip
OTHERS = {"model", "stream", "stream_options", "alignment", *Hints.model_fields}  # do not bear on how it is sampled
TOKENWISE = {
    "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "response_format", "bad_words", "allowed_token_ids",
}  # fmt: skip
MIXED = {"response_format", "bad_words", "allowed_token_ids"}
BLOCKWISE = {"presence_penalty", "frequency_penalty", "bad_words", "response_format"}
GUIDES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "sampling": ({"name": "sampling"}, set()),
    "best_of_n": ({"name": "best_of_n", "n": 3}, set()),
    "speculative_rejection": ({"name": "speculative_rejection", "n": 4}, set()),
    "controlled_decoding": ({"name": "controlled_decoding", "k": 3, "block": 2}, BLOCKWISE),
    "controlled_decoding-rollouts": ({"name": "controlled_decoding", "k": 2, "block": 2, "rollouts": 2}, BLOCKWISE),
    "transfer_q": ({"name": "transfer_q", "top_k": 3, "lookahead": 2}, TOKENWISE),
    "transfer_q-blocks": ({"name": "transfer_q", "top_k": 3, "lookahead": 2, "block": 2}, BLOCKWISE),
    "args": ({"name": "args", "top_k": 3}, TOKENWISE),
    "deal": ({"name": "deal", "top_k": 3, "lookahead": 2}, TOKENWISE),
    "deal-sampled": ({"name": "deal", "top_k": 3, "lookahead": 2, "sampled": True, "beams": 2}, TOKENWISE),
    "logit_mix": ({"name": "logit_mix", "policies": [{"model": "adapter", "weight": -0.5}]}, MIXED),
}


def test_the_table_has_every_field_and_every_guide() -> None:
    assert set(FIELDS) | OTHERS == set(SamplingFields.model_fields) | {"logprobs", "top_logprobs"}
    own = {*ChatRequest.model_fields, *CompletionRequest.model_fields} - set(FIELDS) - OTHERS
    assert own >= {"messages", "prompt", "max_completion_tokens"}
    assert {given["name"] for given, _ in GUIDES.values()} == set(tabular_state().guides)


def test_every_field_of_the_spec_comes_from_the_request() -> None:
    assert {f.name for f in fields(SamplingSpec)} - set(SamplingFields.model_fields) == {"logprobs", "json_schema"}
    body = {
        "temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "seed": 5, "stop": "x", "stop_token_ids": [2],
        "include_stop_str_in_output": True, "min_tokens": 2, "ignore_eos": True, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "repetition_penalty": 1.1, "logit_bias": {"2": 1.5}, "skip_special_tokens": False,
        "stream": True, "priority": 1, "response_format": {"type": "json_object"},
        "logprobs": True, "top_logprobs": 3, "bad_words": ["z"], "allowed_token_ids": [2, 3],
    }  # fmt: skip
    chat = ChatRequest.model_validate({"messages": [{"role": "user", "content": "q"}]} | body)
    assert sampling_spec(chat, 7, ("y",)) == SamplingSpec(
        7, 0.7, 0.9, 0, 0.1, 5, ("x", "y"), (2,), True, 2, True, 0.5, 0.25, 1.1, {2: 1.5}, 3, False, {"type": "object"},
        True, 1, ("z",), (2, 3),
    )  # fmt: skip
    plain = ChatRequest.model_validate({"messages": [{"role": "user", "content": "q"}]})
    assert sampling_spec(plain, 7, ()) == SamplingSpec(7, stream=False)


async def ask(client: httpx.AsyncClient, guide: dict[str, Any], **more: Any) -> httpx.Response:
    chat = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 6, "seed": 4}
    return await client.post(
        "/v1/chat/completions", json=chat | {"alignment": {"guide": guide, "rewards": ["a"]}} | more
    )


@pytest.mark.parametrize("name", GUIDES)
async def test_each_field_is_kept_or_refused_by_name(name: str) -> None:
    guide, refused = GUIDES[name]
    transport = httpx.ASGITransport(create_app(tabular_state()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for field, (value, default) in FIELDS.items():
            more = {"logprobs": True} if field == "top_logprobs" else {}
            again = await ask(client, guide, **{field: default}, **more)
            assert again.status_code == 200, (field, again.text)
            answer = await ask(client, guide, **{field: value}, **more)
            if field in refused:
                error = answer.json()["error"]
                assert (answer.status_code, error["param"], error["type"]) == (400, field, "invalid_request_error")
                assert f"guide '{guide['name']}'" in error["message"]
            else:
                assert answer.status_code == 200, (field, answer.text)
        for temperature in (0, 0.7, 1, 2):
            assert (await ask(client, guide, temperature=temperature)).status_code == 200


@pytest.mark.parametrize("name", GUIDES)
async def test_what_is_kept_shows(name: str) -> None:
    """Ends, lengths and log-probabilities of fields that are kept, over several seeds."""
    guide, _ = GUIDES[name]
    transport = httpx.ASGITransport(create_app(tabular_state(end=0.3)))

    async def texts(**more: Any) -> list[dict[str, Any]]:
        answers = [await ask(client, guide, seed=seed, **more) for seed in range(6)]
        assert [a.status_code for a in answers] == [200] * 6
        return [a.json()["choices"][0] for a in answers]

    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        plain = await texts()
        assert {c["finish_reason"] for c in plain} >= ({"stop"} if guide["name"] != "deal" else set())
        assert all(len(c["message"]["content"]) >= 4 for c in await texts(min_tokens=4))
        on = await texts(ignore_eos=True)
        assert all(c["finish_reason"] == "length" for c in on)
        stopped = await texts(stop=["b", "c"])
        assert not any(set("bc") & set(c["message"]["content"]) for c in stopped)
        for choice in await texts(stop_token_ids=[2, 3]):
            assert not set("bc") & set(choice["message"]["content"])
        if "allowed_token_ids" not in GUIDES[name][1]:
            for choice in await texts(allowed_token_ids=[2, 3]):
                assert set(choice["message"]["content"]) <= set("bc")
        for choice in await texts(logprobs=True, top_logprobs=2):
            rows = choice["logprobs"]["content"]
            assert all(len(row["top_logprobs"]) == 2 for row in rows)
        cold = await texts(temperature=0)
        assert len({c["message"]["content"] for c in cold}) == 1 or guide["name"] in ("transfer_q",)


@pytest.mark.parametrize(
    "guide", [{"name": "best_of_n", "n": 4}, {"name": "controlled_decoding", "k": 3, "block": 2}], ids=str
)
async def test_drawing_the_same_answer_again_and_again_is_warned_of(guide: dict[str, Any]) -> None:
    transport = httpx.ASGITransport(create_app(tabular_state()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for more, warned in (({"temperature": 0}, True), ({"top_k": 1}, True), ({"temperature": 0.7}, False)):
            report = (await ask(client, guide, **more)).json()["alignment"]["choices"][0]["diagnostics"]
            assert any("temperature 0" in warning for warning in report["warnings"]) == warned
