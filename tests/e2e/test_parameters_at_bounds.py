"""Parameters at and beyond their bounds with the real engine: done, or refused by name; every seed is one."""

from typing import Any

import httpx
import pytest
from serving import Live

HI: list[Any] = [{"role": "user", "content": "Tell me a story."}]
CHAT = "/v1/chat/completions"


async def ask(live: Live, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=live.url, timeout=120) as http:
        return await http.post(CHAT, json={"messages": HI, "max_tokens": 8} | more)


@pytest.mark.parametrize("seed", [-(2**63), -3, -2, -1, 0, 1, 2**31, 2**32, 2**63 - 1])
async def test_every_seed_gives_the_same_answers_again(live: Live, seed: int) -> None:
    body = {"n": 3, "seed": seed, "temperature": 1, "max_tokens": 12}
    first, again = [(await ask(live, **body)).json() for _ in range(2)]
    assert [c["message"] for c in first["choices"]] == [c["message"] for c in again["choices"]]
    assert len({c["message"]["content"] for c in first["choices"]}) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2), ("temperature", 5e-324), ("temperature", 0), ("top_p", 5e-324), ("top_p", 1), ("top_k", -1),
        ("top_k", 2**31 - 1), ("min_p", 1), ("min_p", 5e-324), ("repetition_penalty", 0.01), ("repetition_penalty", 10),
        ("presence_penalty", -2), ("frequency_penalty", 2), ("logit_bias", {"5": 100, "6": -100}), ("priority", 100),
        ("stop_token_ids", [0]), ("min_tokens", 8), ("stop", "x" * 1024),
    ],
    ids=str,
)  # fmt: skip
async def test_the_bounds_are_the_engines(live: Live, field: str, value: Any) -> None:
    answer = await ask(live, **{field: value, "seed": 1})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": 2.0000001}, "temperature"), ({"temperature": 1e308}, "temperature"), ({"top_k": 2**31}, "top_k"),
        ({"top_k": 2**64}, "top_k"), ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids"), ({"logit_bias": {"49152": 1}}, "logit_bias"),
        ({"min_tokens": 9}, "min_tokens"), ({"stop": "x" * 1025}, "stop"), ({"seed": 2**63}, "seed"),
        ({"alignment": {"guide": {"name": "logit_mix", "tilt": [{"token": 49152, "value": 1}]}}}, "alignment.guide.tilt"),
        ({"alignment": {"guide": {"name": "logit_mix", "tilt": [{"token": 2**40}]}}}, "alignment.guide.tilt[0].token"),
    ],
    ids=str,
)  # fmt: skip
async def test_beyond_the_bounds_the_field_is_named(live: Live, more: dict[str, Any], param: str) -> None:
    plain = (await ask(live, seed=5)).json()["choices"]
    answer = await ask(live, **more)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param), answer.text
    assert (await ask(live, seed=5)).json()["choices"] == plain


async def test_words_and_tokens_are_barred(live: Live) -> None:
    """bad_words and allowed_token_ids: of the tokens that a plain answer has, one is barred, or others are."""
    plain = (await ask(live, temperature=0, return_token_ids=True, max_tokens=12)).json()["choices"][0]
    word = plain["message"]["content"].split()[1]
    barred = (await ask(live, temperature=0, bad_words=[word], max_tokens=12)).json()["choices"][0]["message"][
        "content"
    ]
    assert word in plain["message"]["content"]
    assert word not in barred.split()
    allowed = sorted(set(plain["token_ids"]))[:5]
    answer = (await ask(live, seed=1, allowed_token_ids=allowed, return_token_ids=True, ignore_eos=True)).json()
    assert set(answer["choices"][0]["token_ids"]) <= set(allowed)
    assert (await ask(live, allowed_token_ids=[2**40])).json()["error"]["param"] == "allowed_token_ids"
    alignment = {"guide": {"name": "args"}, "rewards": ["length"]}
    refused = (await ask(live, bad_words=[word], alignment=alignment)).json()["error"]
    assert (refused["param"], "guide 'args'" in refused["message"]) == ("bad_words", True)
