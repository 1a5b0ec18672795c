"""The HTTP server over the scripted engine and a real socket: streaming, disconnects, faults, keys, limits."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fakes import Faulty, ScriptedEngine, make_state
from serving import serving
from virtual_time import in_virtual_time
from waiting import until

from guiderail.server.requests import build
from guiderail.server.requests.schemas import ChatRequest
from guiderail.server.settings import OperatorLimits

BODY = {"messages": [{"role": "user", "content": "q"}], "seed": 10, "max_tokens": 400}
BEST = {"guide": {"name": "best_of_n", "n": 4}, "rewards": [{"name": "last_digit"}], "return_candidates": True}


def endless(seed: int) -> list[str]:
    return [f"w{seed}"] * 1000


async def events(client: httpx.AsyncClient, body: dict[str, Any]) -> list[Any]:
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_streamed_and_whole_answers_are_the_same() -> None:
    async with serving(make_state(ScriptedEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        for extra in ({}, {"alignment": BEST}, {"n": 3}, {"logprobs": True, "top_logprobs": 1}):
            whole = (await client.post("/v1/chat/completions", json=BODY | extra)).json()
            chunks = await events(client, BODY | extra | {"stream": True, "stream_options": {"include_usage": True}})
            assert chunks[-1] == "[DONE]"
            last = chunks[-2]
            assert last["choices"] == []
            assert last["usage"] == whole["usage"]
            assert {chunk["system_fingerprint"] for chunk in chunks[:-1]} == {whole["system_fingerprint"]}
            for part in ("config", "choices"):
                assert last["alignment"][part] == whole["alignment"][part]
            for choice in whole["choices"]:
                mine = [c for e in chunks[:-1] for c in e["choices"] if c["index"] == choice["index"]]
                assert mine[0]["delta"] == {"role": "assistant", "content": ""}
                assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
                assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"
                logprobs = [row for c in mine if c["logprobs"] for row in c["logprobs"]["content"]]
                assert logprobs == (choice["logprobs"] or {"content": []})["content"]


async def test_the_fingerprint_is_the_servers_own_in_chats_and_completions() -> None:
    state = make_state(ScriptedEngine())
    invariant = replace(state, settings=state.settings.model_copy(update={"batch_invariant": True}))
    for served, mode in ((state, "fast"), (invariant, "batch-invariant")):
        async with serving(served) as url, httpx.AsyncClient(base_url=url) as client:
            chat = (await client.post("/v1/chat/completions", json=BODY)).json()["system_fingerprint"]
            text = (await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})).json()
        assert chat == text["system_fingerprint"]
        assert chat.startswith(f"{state.settings.model_name} float32 guiderail-")
        assert chat.endswith(f" {mode}")


async def test_without_usage_the_alignment_is_in_the_last_chunk() -> None:
    async with serving(make_state(ScriptedEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        chunks = await events(client, BODY | {"stream": True, "n": 2})
    assert "alignment" in chunks[-2]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert not any("alignment" in chunk or "usage" in chunk for chunk in chunks[:-2])


async def test_the_first_chunk_arrives_before_the_last_is_generated() -> None:
    engine = ScriptedEngine(endless, step_s=0.01)
    async with serving(make_state(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as response:
            async for _ in response.aiter_lines():
                break
            assert engine.num_running() == 1
        await until(lambda: engine.num_running() == 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("extra", [{}, {"alignment": BEST}, {"n": 2, "alignment": BEST}])
async def test_a_disconnect_frees_the_engine(stream: bool, extra: dict[str, Any]) -> None:
    engine = ScriptedEngine(endless, step_s=0.01)
    state = make_state(engine)
    async with serving(state) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            request = asyncio.create_task(client.post("/v1/chat/completions", json=BODY | extra | {"stream": stream}))
            await until(lambda: engine.num_running() > 0)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        await until(lambda: engine.num_running() == 0)
        async with httpx.AsyncClient(base_url=url) as client:
            text = (await client.get("/metrics")).text
    assert 'outcome="cancelled"} 1.0' in text
    assert 'guiderail:num_requests_running{model_name="fake"} 0.0' in text


async def test_a_stream_tells_of_an_error_after_its_start() -> None:
    async with serving(make_state(ScriptedEngine(fail_after=2))) as url, httpx.AsyncClient(base_url=url) as client:
        chunks = await events(client, BODY | {"stream": True})
        assert chunks[-1] == "[DONE]"
        assert chunks[-2]["error"]["code"] == "engine_unavailable"
        assert "".join(c["choices"][0]["delta"]["content"] for c in chunks[:-2]) == "w10 one"


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_before_the_first_event_has_a_status(stream: bool) -> None:
    engine = ScriptedEngine(fail_after=0)
    async with serving(make_state(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/chat/completions", json=BODY | {"stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(response.headers["retry-after"]) > 0
        engine.up = False
        assert (await client.get("/ready")).status_code == 503


async def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guiderail.server.api.transport.KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr("guiderail.server.api.transport.HEADERS_AFTER_S", 0.05)
    engine = ScriptedEngine(step_s=0.1)
    async with serving(make_state(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/chat/completions", json=BODY | {"stream": True, "alignment": BEST})
    assert response.text.startswith(": keep-alive\n\n")
    assert response.text.endswith("data: [DONE]\n\n")
    assert "three" in response.text


async def test_a_late_error_of_a_silent_stream_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guiderail.server.api.transport.HEADERS_AFTER_S", 0.02)
    engine = ScriptedEngine(step_s=0.05, fail_after=2)
    async with serving(make_state(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        chunks = await events(client, BODY | {"stream": True, "alignment": BEST})
    assert chunks[0]["error"]["code"] == "engine_unavailable"
    assert chunks[1] == "[DONE]"


async def test_a_failing_reward_fails_its_request_and_no_other() -> None:
    state = make_state(ScriptedEngine(step_s=0.01), {"faulty": Faulty("raise")})
    bad = BODY | {"alignment": {"rewards": ["faulty"]}}
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        good, failed = await asyncio.gather(
            client.post("/v1/chat/completions", json=BODY | {"alignment": BEST}),
            client.post("/v1/chat/completions", json=bad),
        )
    assert good.status_code == 200
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "reward_failed"
    assert "'faulty'" in failed.json()["error"]["message"]


@in_virtual_time
async def test_deadline_and_budget_are_reported() -> None:
    state = make_state(ScriptedEngine(endless, step_s=0.01))
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        for budget, cause in (({"deadline_s": 0.2}, "deadline"), ({"max_tokens_generated": 40}, "budget")):
            answer = (
                await client.post("/v1/chat/completions", json=BODY | {"alignment": BEST | {"budget": budget}})
            ).json()
            assert answer["alignment"]["choices"][0]["stopped_by"] == cause
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["choices"][0]["message"]["content"]
        late = await client.post("/v1/chat/completions", json=BODY | {"alignment": {"budget": {"deadline_s": 1e-6}}})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize(("within", "kept"), [(100, 0.3), (2, 0.1)])
def test_a_deadline_counts_from_arrival_and_leaves_time_to_answer(within: float, kept: float) -> None:
    body = BODY | {"alignment": {"budget": {"deadline_s": within}}}
    request = build.chat(make_state(ScriptedEngine()), ChatRequest.model_validate(body), 1000.0)
    assert request.deadline == pytest.approx(1000 + within - kept)
    assert request.spend.started == 1000


async def test_usage_and_spend_add_up() -> None:
    async with serving(make_state(ScriptedEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        answer = (await client.post("/v1/chat/completions", json=BODY | {"alignment": BEST, "n": 2})).json()
        metrics = (await client.get("/metrics")).text
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}
    spend = answer["alignment"]["spend"]
    assert (spend["tokens_generated"], spend["tokens_accepted"], spend["tokens_discarded"]) == (32, 8, 24)
    assert (spend["rollouts"], spend["reward_calls"]) == (8, 8)
    assert 'guiderail:tokens_total{fate="discarded",guide="best_of_n",model_name="fake"} 24.0' in metrics


async def test_api_keys() -> None:
    state = make_state(ScriptedEngine(), api_key=["one", "two"])
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        for path in ("/v1/models", "/metrics", "/v1/guides", "/docs"):
            assert (await client.get(path)).status_code == 401
        for key in ("one", "two"):
            assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code == 200
        refused = await client.get("/v1/models", headers={"Authorization": "Bearer three"})
        assert refused.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/ready", "/version", "/health/"):
            assert (await client.get(path)).status_code == 200


async def test_a_body_that_is_too_large_is_refused() -> None:
    async with serving(make_state(ScriptedEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/chat/completions", content=b" " * (16 * 2**20 + 1))
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


async def test_operator_limits_on_tokens_and_candidates() -> None:
    limits = OperatorLimits(max_n=3, max_tokens=5, max_candidates=6)
    async with (
        serving(make_state(ScriptedEngine(endless), limits=limits)) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):

        async def fault(**fields: Any) -> tuple[str, str]:
            body = {k: v for k, v in (BODY | {"max_tokens": 5} | fields).items() if v is not None}
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 400
            error = response.json()["error"]
            return error["param"], error["message"]

        assert (await fault(n=4))[0] == "n"
        assert (await fault(max_tokens=6))[0] == "max_tokens"
        param, message = await fault(n=2, alignment=BEST)
        assert (param, "at most 6" in message) == ("alignment.guide", True)
        free = (
            await client.post("/v1/chat/completions", json={k: v for k, v in BODY.items() if k != "max_tokens"})
        ).json()
        assert free["usage"]["completion_tokens"] == 5  # the limit is the default, too
