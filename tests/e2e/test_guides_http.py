"""Every guide over HTTP on the real engine: streamed and whole agree, costs are told, stops and limits hold."""

import json
from typing import Any

import httpx
import pytest
from serving import Live

SENTIMENT = ["sentiment"]
GUIDES: list[dict[str, Any]] = [
    {"name": "best_of_n", "n": 4},
    {"name": "speculative_rejection", "n": 4, "interval": 4},
    {"name": "controlled_decoding", "k": 3, "block": 4},
    {"name": "controlled_decoding", "k": 2, "block": 4, "rollouts": 1, "horizon": 4},
    {"name": "transfer_q", "top_k": 3, "lookahead": 4},
    {"name": "transfer_q", "top_k": 3, "lookahead": 4, "block": 4, "baseline": {"model": "noise"}},
    {"name": "transfer_q", "top_k": 2, "lookahead": 3, "baseline": {"system": "Be cheerful."}},
    {"name": "args", "top_k": 4},
    {"name": "deal", "top_k": 3, "lookahead": 3},
    {"name": "deal", "beams": 2, "top_k": 2, "lookahead": 2, "instruction": "Be kind."},
]


def body(alignment: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Name three colours."}],
        "max_tokens": 12,
        "seed": 3,
        "alignment": {"rewards": SENTIMENT} | alignment,
    } | more


async def whole(live: Live, request: dict[str, Any]) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
        response = await client.post("/v1/chat/completions", json=request)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


async def streamed(live: Live, request: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    pieces, report = [], {}
    async with (
        httpx.AsyncClient(base_url=live.url, timeout=120) as client,
        client.stream("POST", "/v1/chat/completions", json=request | {"stream": True}) as stream,
    ):
        assert stream.status_code == 200
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                pieces += [c["delta"]["content"] for c in chunk["choices"] if c["delta"].get("content")]
                report = chunk.get("alignment", report)
    return pieces, report


@pytest.mark.parametrize("guide", GUIDES, ids=str)
async def test_each_guide_streams_what_it_answers(live: Live, guide: dict[str, Any]) -> None:
    answer = await whole(live, body({"guide": guide}))
    pieces, report = await streamed(live, body({"guide": guide}))
    text = answer["choices"][0]["message"]["content"]
    assert text
    assert "".join(pieces) == text
    if guide["name"] not in ("best_of_n", "speculative_rejection") and guide.get("beams", 1) == 1:
        assert len(pieces) > 1
    told = answer["alignment"]
    assert told["config"] == report["config"]
    assert told["choices"][0]["rewards"]["sentiment"] == pytest.approx(report["choices"][0]["rewards"]["sentiment"])
    assert told["spend"]["tokens_accepted"] == answer["usage"]["completion_tokens"] <= 12
    assert told["spend"]["tokens_generated"] >= told["spend"]["tokens_accepted"]
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert live.state.engine.num_running() == 0


@pytest.mark.parametrize("guide", GUIDES, ids=str)
async def test_each_guide_keeps_stop_strings(live: Live, guide: dict[str, Any]) -> None:
    plain = (await whole(live, body({"guide": guide})))["choices"][0]["message"]["content"]
    stop = plain[len(plain) // 2 :][:3]
    request = body({"guide": guide}, stop=[stop])
    cut = (await whole(live, request))["choices"][0]
    assert stop not in cut["message"]["content"]
    assert "".join((await streamed(live, request))[0]) == cut["message"]["content"]


@pytest.mark.parametrize("guide", [g for g in GUIDES if g["name"] != "best_of_n"], ids=str)
async def test_a_budget_ends_each_guide_with_what_there_is(live: Live, guide: dict[str, Any]) -> None:
    answer = await whole(live, body({"guide": guide, "budget": {"max_tokens_generated": 16}}, max_tokens=200))
    assert answer["alignment"]["choices"][0]["stopped_by"] == "budget"
    assert answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("guide", "more", "param"),
    [
        ({"name": "transfer_q", "top_k": 0}, {}, "alignment.guide.top_k"),
        ({"name": "transfer_q", "baseline": {"model": "nobody"}}, {}, "alignment.guide"),
        ({"name": "transfer_q", "rollouts": 2, "baseline_reward": "nothing"}, {}, "alignment.guide.baseline_reward"),
        ({"name": "transfer_q"}, {"presence_penalty": 1}, "presence_penalty"),
        ({"name": "args"}, {"logit_bias": {"5": 1}}, "logit_bias"),
        ({"name": "deal", "lookahead": -1}, {}, "alignment.guide.lookahead"),
        ({"name": "controlled_decoding", "block": 0}, {}, "alignment.guide.block"),
        ({"name": "speculative_rejection", "alpha": 1}, {}, "alignment.guide.alpha"),
        ({"name": "deal"}, {"response_format": {"type": "json_object"}}, "response_format"),
        ({"name": "transfer_q", "top_k": 48, "rollouts": 8}, {}, "alignment.guide"),
    ],
    ids=str,
)
async def test_bad_parameters_are_named(live: Live, guide: dict[str, Any], more: dict[str, Any], param: str) -> None:
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
        response = await client.post("/v1/chat/completions", json=body({"guide": guide}, **more))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize(
    "prompter",
    [
        {"name": "urial", "style": "brief"},
        {"name": "urial", "instruction": "Answer.", "examples": [{"query": "Hi", "answer": "Hello!"}]},
        {"name": "system_message", "preferences": ["Be brief.", "Be kind."], "role": "a teacher"},
    ],
    ids=str,
)
@pytest.mark.parametrize("guide", ["sampling", {"name": "controlled_decoding", "k": 2, "block": 6}], ids=str)
async def test_prompters_compose_with_guides(live: Live, prompter: dict[str, Any], guide: Any) -> None:
    request = body({"guide": guide, "prompter": prompter}, max_tokens=40)
    answer = await whole(live, request)
    text = answer["choices"][0]["message"]["content"]
    assert "# Query" not in text
    assert "".join((await streamed(live, request))[0]) == text
    assert answer["alignment"]["config"]["prompter"]["name"] == prompter["name"]
    plain = await whole(live, body({"guide": guide}))
    assert answer["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("prompter", "param"),
    [
        ({"name": "alpaca"}, "alignment.prompter.name"),
        ({"name": "urial", "style": "rude"}, "alignment.prompter.style"),
        ({"name": "urial", "examples": []}, "alignment.prompter.examples"),
        ({"name": "system_message"}, "alignment.prompter.preferences"),
        ({"name": "system_message", "preferences": [" "]}, "alignment.prompter.preferences"),
    ],
    ids=str,
)
async def test_bad_prompters_are_named(live: Live, prompter: dict[str, Any], param: str) -> None:
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
        response = await client.post("/v1/chat/completions", json=body({"prompter": prompter}))
        text = await client.post(
            "/v1/completions", json={"prompt": "a", "alignment": {"prompter": {"name": "urial"}, "rewards": SENTIMENT}}
        )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)
    assert text.json()["error"]["param"] == "alignment.prompter"
