"""The real server and engine over a real socket, driven by the official client as a user would."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from jsonschema import validate
from serving import Live
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

MODEL = "smollm2-135m-instruct"
CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
POEM: list[Any] = [{"role": "user", "content": "Tell me about your day and a friend."}]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client(live: Live) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


async def engine_idle(live: Live) -> None:
    """Waits until /metrics counts no open engine rows."""
    async with httpx.AsyncClient(base_url=live.url) as http, asyncio.timeout(60):
        while 'guiderail:engine_rows{model_name="smollm2-135m-instruct"} 0.0' not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.02)


async def generated(live: Live, guide: str) -> float:
    """Tokens that a guide's requests have generated so far, by /metrics."""
    async with httpx.AsyncClient(base_url=live.url) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    wanted = [line for line in lines if line.startswith("guiderail:tokens_total{") and f'guide="{guide}"' in line]
    return sum(float(line.split()[-1]) for line in wanted if 'fate="prompt"' not in line)


async def test_a_plain_answer(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=30)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id.startswith("chatcmpl-")


async def test_a_streamed_answer_arrives_while_it_is_generated(client: openai.AsyncOpenAI, live: Live) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=POEM, max_tokens=60, seed=1, stream=True, stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    running_at_first: int | None = None
    text, usage = "", None
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            if running_at_first is None:
                running_at_first = live.state.engine.num_running()
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
    assert running_at_first == 1, "the first chunk came after the last token"
    assert usage is not None
    assert usage.completion_tokens == 60
    whole = await client.chat.completions.create(
        model=MODEL, messages=POEM, max_tokens=60, seed=1, extra_body={"ignore_eos": True}
    )
    assert whole.choices[0].message.content == text


async def test_best_of_16_with_two_rewards_is_the_argmax(client: openai.AsyncOpenAI) -> None:
    alignment = {
        "guide": {"name": "best_of_n", "n": 16},
        "rewards": [{"name": "sentiment", "weight": 2.0}, {"name": "length", "target": 20, "weight": 0.5}],
        "return_candidates": True,
    }
    answer = await client.chat.completions.create(
        model=MODEL, messages=POEM, max_tokens=48, seed=3, extra_body={"alignment": alignment}
    )
    report = answer.model_dump()["alignment"]
    candidates = report["choices"][0]["candidates"]
    assert len(candidates) == 16
    analyzer = SentimentIntensityAnalyzer()
    for candidate in candidates:  # every reward and the sum again, from the text alone
        sentiment = analyzer.polarity_scores(candidate["text"])["compound"]
        length = -abs(len(candidate["text"].split()) - 20) / 20
        assert candidate["rewards"] == pytest.approx({"sentiment": sentiment, "length": length})
        assert candidate["score"] == pytest.approx(2 * sentiment + 0.5 * length)
    best = max(candidates, key=lambda c: c["score"])
    assert report["choices"][0]["chosen"] == best["index"]
    assert answer.choices[0].message.content == best["text"]
    assert len({c["text"] for c in candidates}) > 8
    spend = report["spend"]
    assert spend["tokens_generated"] == sum(c["tokens"] for c in candidates)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == best["tokens"] == spend["tokens_accepted"]


async def test_the_first_candidate_of_best_of_n_is_the_plain_answer_and_others_share_no_seed(
    client: openai.AsyncOpenAI,
) -> None:
    alignment = {"guide": {"name": "best_of_n", "n": 4}, "rewards": ["sentiment"], "return_candidates": True}
    guided = await client.chat.completions.create(
        model=MODEL, messages=POEM, max_tokens=12, seed=5, extra_body={"alignment": alignment}
    )
    plain = await client.chat.completions.create(model=MODEL, messages=POEM, max_tokens=12, seed=5, n=4)
    drawn = [c["text"] for c in guided.model_dump()["alignment"]["choices"][0]["candidates"]]
    answers = [choice.message.content for choice in plain.choices]
    assert drawn[0] == answers[0]
    assert len({*drawn, *answers}) == 7


@pytest.mark.parametrize("seed", [-1, -2, 0, 2**63 - 1, -(2**63)])
async def test_every_seed_is_reproducible(client: openai.AsyncOpenAI, seed: int) -> None:
    """-1 too, which vLLM takes for no seed: two answers of the request and their candidates come again."""
    alignment = {"guide": {"name": "best_of_n", "n": 2}, "rewards": ["sentiment"], "return_candidates": True}

    async def texts() -> list[str]:
        answer = await client.chat.completions.create(
            model=MODEL, messages=POEM, max_tokens=8, seed=seed, n=2, extra_body={"alignment": alignment}
        )
        return [c["text"] for choice in answer.model_dump()["alignment"]["choices"] for c in choice["candidates"]]

    first = await texts()
    assert await texts() == first
    assert len(set(first)) == 4


async def test_seeds_reproduce_and_differ(client: openai.AsyncOpenAI) -> None:
    async def text(seed: int, **extra: Any) -> str | None:
        answer = await client.chat.completions.create(
            model=MODEL, messages=POEM, max_tokens=24, seed=seed, extra_body=extra
        )
        return answer.choices[0].message.content

    soft = {
        "guide": {"name": "best_of_n", "n": 4},
        "rewards": ["sentiment"],
        "select": {"name": "softmax", "beta": 1.0},
    }
    assert await text(7) == await text(7)
    assert await text(7) != await text(8)
    assert await text(7, alignment=soft) == await text(7, alignment=soft)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_aborts_in_the_engine(client: openai.AsyncOpenAI, live: Live, stream: bool) -> None:
    alignment = {"guide": {"name": "best_of_n", "n": 8}, "rewards": ["sentiment"]}
    body = {"messages": POEM, "max_tokens": 512, "ignore_eos": True, "stream": stream, "alignment": alignment}
    before = await generated(live, "best_of_n")
    async with httpx.AsyncClient(base_url=live.url) as http:
        request = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        async with asyncio.timeout(60):
            while live.state.engine.num_running() < 8:
                await asyncio.sleep(0.01)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    await engine_idle(live)
    assert await generated(live, "best_of_n") - before < 8 * 512


async def test_a_deadline_frees_the_engine_and_returns_what_there_is(client: openai.AsyncOpenAI, live: Live) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=POEM, max_tokens=512,
        extra_body={"ignore_eos": True, "alignment": {"budget": {"deadline_s": 2}}},
    )  # fmt: skip
    report = answer.model_dump()["alignment"]
    assert report["choices"][0]["stopped_by"] == "deadline"
    assert 0 < report["spend"]["tokens_generated"] < 512
    assert answer.choices[0].message.content
    await engine_idle(live)


async def test_profiles_by_field_and_by_model_suffix(client: openai.AsyncOpenAI) -> None:
    listed = {model.id async for model in client.models.list()}
    assert {MODEL, f"{MODEL}@cheerful", "zero", "noise", "noise@cheerful"} <= listed
    by_suffix = await client.chat.completions.create(model=f"{MODEL}@cheerful", messages=POEM, max_tokens=16, seed=2)
    by_field = await client.chat.completions.create(
        model=MODEL, messages=POEM, max_tokens=16, seed=2, extra_body={"alignment": "cheerful"}
    )
    assert by_suffix.model == f"{MODEL}@cheerful"
    assert by_suffix.choices[0].message.content == by_field.choices[0].message.content
    assert by_suffix.model_dump()["alignment"]["config"]["guide"] == {"name": "best_of_n", "n": 4}


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=CAPITAL, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for row in logprobs.content:
        assert [t.logprob for t in row.top_logprobs] == sorted((t.logprob for t in row.top_logprobs), reverse=True)
        assert len(row.top_logprobs) == 3
        assert row.logprob == row.top_logprobs[0].logprob <= 0  # greedy
        assert sum(math.exp(t.logprob) for t in row.top_logprobs) <= 1.0001
    assert "".join(bytes(row.bytes or []).decode() for row in logprobs.content) == answer.choices[0].message.content


async def test_sampling_fields_reach_the_engine(client: openai.AsyncOpenAI) -> None:
    async def answer(**fields: Any) -> Any:
        return (await client.chat.completions.create(model=MODEL, messages=CAPITAL, max_tokens=24, **fields)).choices[0]

    greedy = (await answer(temperature=0)).message.content
    assert (await answer(seed=1, extra_body={"top_k": 1})).message.content == greedy
    assert (await answer(seed=1, top_p=1e-6)).message.content == greedy
    assert (await answer(seed=1, extra_body={"min_p": 1.0})).message.content == greedy
    stopped = await answer(temperature=0, stop=[" France"])
    assert (stopped.message.content, stopped.finish_reason) == ("The capital of", "stop")
    assert stopped.model_extra["stop_reason"] == " France"
    banned = await answer(temperature=0, logit_bias={"504": -100})  # token 504 is "The"
    assert not banned.message.content.startswith("The")
    long = await answer(temperature=0, extra_body={"min_tokens": 24})
    assert long.finish_reason == "length"


async def test_structured_output_is_kept_by_sampling_and_best_of_n(client: openai.AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    best = {"guide": {"name": "best_of_n", "n": 3}, "rewards": [{"name": "json_schema", "schema": schema}]}
    for extra in ({}, {"alignment": best}):
        answer = await client.chat.completions.create(
            model=MODEL, messages=CAPITAL, max_tokens=100, seed=1, extra_body=extra,
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
        )  # fmt: skip
        validate(json.loads(answer.choices[0].message.content or ""), schema)


async def test_continuing_the_final_message(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=[*CAPITAL, {"role": "assistant", "content": "The capital of France is"}],
        temperature=0, max_tokens=8, extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )  # fmt: skip
    assert (answer.choices[0].message.content or "").startswith(" Paris")


async def test_text_completions(client: openai.AsyncOpenAI) -> None:
    two = await client.completions.create(
        model=MODEL, prompt=["The capital of France is", "2 + 2 ="], n=2, max_tokens=4, temperature=0, logprobs=1
    )
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    assert "Paris" in two.choices[0].text
    assert two.choices[0].text == two.choices[1].text != two.choices[2].text
    logprobs = two.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == two.choices[0].text
    assert (await client.completions.create(model=MODEL, prompt="Hi", seed=1)).usage.completion_tokens <= 16  # type: ignore[union-attr]


async def test_token_id_prompts_equal_their_text(client: openai.AsyncOpenAI, live: Live) -> None:
    text = "The capital of France is"
    ids = live.state.renderer.encode(text)
    by_text = await client.completions.create(model=MODEL, prompt=text, max_tokens=8, temperature=0)
    by_ids = await client.completions.create(model=MODEL, prompt=ids, max_tokens=8, temperature=0)
    assert by_ids.choices[0].text == by_text.choices[0].text


async def test_adapters_are_models_of_their_own(client: openai.AsyncOpenAI) -> None:
    async def text(model: str) -> str | None:
        answer = await client.chat.completions.create(model=model, messages=POEM, temperature=0, max_tokens=24)
        return answer.choices[0].message.content

    base, zero, noise = await asyncio.gather(text(MODEL), text("zero"), text("noise"))
    assert zero == base != noise


async def test_third_party_reward_and_guide_are_served(client: openai.AsyncOpenAI) -> None:
    alignment = {"guide": "best_of_n", "rewards": [{"name": "exclamations", "at_most": 2}], "return_candidates": True}
    answer = await client.chat.completions.create(
        model=MODEL, messages=POEM, max_tokens=16, extra_body={"alignment": alignment}
    )
    chosen = answer.model_dump()["alignment"]["choices"][0]
    assert chosen["score"] == min(2, answer.choices[0].message.content.count("!"))  # type: ignore[union-attr]
    short = await client.chat.completions.create(
        model=MODEL,
        messages=POEM,
        max_tokens=40,
        extra_body={"alignment": {"guide": "shortest", "return_candidates": True}},
    )
    texts = [c["text"] for c in short.model_dump()["alignment"]["choices"][0]["candidates"]]
    assert short.choices[0].message.content == min(texts, key=len)


async def test_guides_and_rewards_describe_themselves(live: Live) -> None:
    async with httpx.AsyncClient(base_url=live.url) as http:
        for path, name in (("/v1/guides", "best_of_n"), ("/v1/rewards", "keywords")):
            listing = (await http.get(path)).json()
            assert listing["object"] == "list"
            (entry,) = (e for e in listing["data"] if e["name"] == name)
            assert entry["description"]
            assert entry["parameters"]["type"] == "object"
        for reward in (await http.get("/v1/rewards")).json()["data"]:  # each is complete by its name alone
            body = {
                "messages": CAPITAL,
                "max_tokens": 8,
                "alignment": {"guide": {"name": "best_of_n", "n": 2}, "rewards": [reward["name"]]},
            }
            answer = await http.post("/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert math.isfinite(answer.json()["alignment"]["choices"][0]["score"])
