"""Policies mixed inside the real engine: against distributions that are known, beside plain rows, and out of step."""

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest
from serving import Live

from guiderail.guides.core.types import Mixed, SamplingSpec, TokenPrompt

TOKENS = 6


def prompt(live: Live, text: str = "The weather today is") -> tuple[int, ...]:
    return tuple(live.state.renderer.encode(text))


async def draw(live: Live, prompts: list[TokenPrompt], **spec: Any) -> list[list[int]]:
    sampling = SamplingSpec(**({"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True} | spec))
    rows: list[list[int]] = [[] for _ in prompts]
    async with live.state.engine.generate(prompts, sampling, seeds=list(range(len(prompts)))) as rollouts:
        async for delta in rollouts:
            rows[delta.row] += delta.token_ids
    return rows


async def next_logprobs(live: Live, ids: tuple[int, ...], adapter: str | None) -> dict[int, float]:
    return (await live.state.engine.next_token_logprobs([TokenPrompt(ids, adapter)], 50))[0]


@pytest.mark.parametrize("weight", [1.0, -0.5])
async def test_greedy_mixing_follows_the_two_policies(live: Live, weight: float) -> None:
    """Each token is the best by both policies' own log-probabilities."""
    ids = prompt(live)
    (got,) = await draw(live, [TokenPrompt(ids, None, (Mixed(ids, "noise", weight),))])
    assert len(got) == TOKENS
    for place, token in enumerate(got):
        before = (*ids, *got[:place])
        base = await next_logprobs(live, before, None)
        prompts = [TokenPrompt(before, "noise")] * len(base)
        other = await live.state.engine.answer_logprobs(prompts, [(token,) for token in base])
        mixed = {t: p + weight * q[0] for (t, p), q in zip(base.items(), other, strict=True)}
        assert token in mixed
        assert mixed[token] >= max(mixed.values()) - 1e-3
    (alone,) = await draw(live, [TokenPrompt(ids)])
    (noise,) = await draw(live, [TokenPrompt(ids, "noise")])
    assert noise != alone


async def test_weight_zero_is_the_plain_policy(live: Live) -> None:
    ids = prompt(live)
    zero = TokenPrompt(ids, None, (Mixed(ids, "noise", 0.0),))
    assert await draw(live, [zero], temperature=1.0) == await draw(live, [TokenPrompt(ids)], temperature=1.0)


async def test_mixing_a_policy_with_itself_halves_the_temperature(live: Live) -> None:
    """pi * pi at temperature T is pi at T / 2: the first token's frequencies agree."""
    ids = prompt(live, "My favourite colour is")
    rows = 96
    twice = await draw(live, [TokenPrompt(ids, None, (Mixed(ids, None, 1.0),))] * rows, temperature=1.0, max_tokens=1)
    base = await next_logprobs(live, ids, None)
    tokens = list(base)
    distribution = np.exp(2 * np.array(list(base.values())))
    distribution /= distribution.sum()
    top = tokens[int(distribution.argmax())]
    p = float(distribution.max())
    share = sum(row[0] == top for row in twice) / rows
    assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / rows) + 0.03
    plain_p = float(np.exp(base[top]))
    assert p > plain_p + 0.02, "the control: one policy alone has another distribution"


async def test_steering_away_keeps_to_what_the_policy_finds_plausible(live: Live) -> None:
    """Every token has at least 0.1 of the policy's top probability by the policy's own log-probabilities."""
    least = []
    for share in (0.1, 0.0):
        ids = prompt(live)
        away = TokenPrompt(ids, None, (Mixed(ids, "noise", -0.9),), share)
        rows = await draw(live, [away] * 3, temperature=1.0, max_tokens=10)
        gaps = []
        for row in rows:
            for place, token in enumerate(row):
                before = (*ids, *row[:place])
                top = max((await next_logprobs(live, before, None)).values())
                ((own,),) = await live.state.engine.answer_logprobs([TokenPrompt(before)], [(token,)])
                gaps.append(own - top)
        least.append(min(gaps))
    assert least[0] >= np.log(0.1) - 0.15  # the grid of bfloat16 logits
    assert least[1] < np.log(0.1) - 2, "the control: without the mask there are absurd ones among 30 tokens"


async def test_mixed_rows_beside_plain_ones_change_nothing(live: Live) -> None:
    ids = prompt(live)
    mixed = TokenPrompt(ids, None, (Mixed(ids, "noise", 1.0),))
    alone = (await draw(live, [mixed]))[0]
    together = await draw(live, [mixed, TokenPrompt(ids)] * 6)
    agree = sum(row == alone for row in together[::2])
    assert agree >= 5, "bfloat16 ties may turn one row in another batch, not most"
    assert live.state.engine.num_running() == 0


async def test_abandoned_mixtures_free_every_row(live: Live) -> None:
    ids = prompt(live)
    mixed = TokenPrompt(ids, None, (Mixed(ids, "noise", 1.0), Mixed(ids, "zero", -0.5)))
    spec = SamplingSpec(400, 1.0, ignore_eos=True)
    async with live.state.engine.generate([mixed] * 4, spec, seeds=[1, 2, 3, 4]) as rollouts:
        async for delta in rollouts:
            if delta.row == 3 and delta.token_ids:
                break
    async with asyncio.timeout(10):
        while live.state.engine.num_running():
            await asyncio.sleep(0.05)


def body(guide: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Describe your day."}],
        "max_tokens": 16,
        "seed": 5,
        "alignment": {"guide": {"name": "logit_mix", **guide}},
    } | more


async def post(live: Live, request: dict[str, Any]) -> httpx.Response:
    async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
        return await client.post("/v1/chat/completions", json=request)


async def test_the_guide_mixes_tilts_and_counts(live: Live) -> None:
    guide = {"policies": [{"system": "You are a pirate.", "weight": 1.5}, {"model": "noise", "weight": 0.2}]}
    answer = (await post(live, body(guide))).json()
    assert answer["choices"][0]["message"]["content"]
    spend = answer["alignment"]["spend"]
    assert spend["mixed_tokens"] == 2 * spend["tokens_generated"] == 2 * spend["tokens_accepted"]
    again = (await post(live, body(guide))).json()
    assert again["choices"][0]["message"] == answer["choices"][0]["message"]
    (word,) = live.state.renderer.encode(" banana")[:1]
    tilted = (await post(live, body({"tilt": [{"token": word, "value": 100}]}, max_tokens=3))).json()
    assert live.state.renderer.token_text(word) * 3 in tilted["choices"][0]["message"]["content"]


async def test_stop_strings_and_limits_end_a_mixture(live: Live) -> None:
    guide = {"policies": [{"system": "You are a pirate."}]}
    plain = (await post(live, body(guide))).json()["choices"][0]["message"]["content"]
    stop = plain[len(plain) // 2 :][:3]
    cut = (await post(live, body(guide, stop=stop))).json()["choices"][0]
    assert cut["finish_reason"] == "stop"
    assert cut["message"]["content"] == plain[: plain.index(stop)]
    assert live.state.engine.num_running() == 0


@pytest.mark.parametrize(
    "guide",
    [
        {},
        {"policies": [{"model": "nobody"}]},
        {"policies": [{"weight": 11}]},
        {"policies": [{}] * 5},
        {"tilt": [{"token": "several tokens here", "value": 1}]},
        {"tilt": [{"token": 5, "value": 101}]},
    ],
    ids=str,
)
async def test_bad_mixtures_are_named(live: Live, guide: dict[str, Any]) -> None:
    response = await post(live, body(guide))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith("alignment.guide")
