"""Requests for scores go through the same door as all others: they wait, are refused, and are counted."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fakes import Faulty, ScriptedEngine, make_state
from serving import serving
from waiting import until

from guiderail.guides import ScoreResult
from guiderail.guides.core.reward import Reward
from guiderail.server.requests.schemas import ScoreRequest
from guiderail.server.requests.score import scoring

BODY: dict[str, Any] = {
    "inputs": [{"messages": [{"role": "user", "content": "q"}], "answers": ["w1", "w2 abc"]}],
    "rewards": ["last_digit"],
}


class Gate(Reward):
    """Scores nothing until it is opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.calls = 0

    async def score(self, groups: Any) -> list[ScoreResult]:
        self.calls += 1
        await self.open.wait()
        return [ScoreResult((1.0,) * len(group.answers)) for group in groups]


class Asks(Faulty):
    """A reward that asks the engine."""

    batched = False
    asks_engine = True


def lines(metrics: str, name: str) -> list[str]:
    return [line for line in metrics.splitlines() if line.startswith(f"guiderail:{name}")]


async def test_a_score_is_counted_like_any_request() -> None:
    state = make_state(ScriptedEngine(), {"faulty": Faulty("raise")})
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        found = (await client.post("/v1/rewards/score", json=BODY)).json()
        assert [answer["score"] for answer in found["data"][0]["answers"]] == [1.0, 2.0]
        assert (await client.post("/v1/rewards/score", json=BODY | {"rewards": ["faulty"]})).status_code == 500
        assert (await client.post("/v1/rewards/score", json=BODY | {"rewards": ["nope"]})).status_code == 400
        metrics = (await client.get("/metrics")).text
    assert set(lines(metrics, "requests_total")) == {
        'guiderail:requests_total{guide="score",model_name="fake",outcome="success"} 1.0',
        'guiderail:requests_total{guide="score",model_name="fake",outcome="error"} 1.0',
        'guiderail:requests_total{guide="none",model_name="fake",outcome="rejected"} 1.0',
    }
    assert lines(metrics, "e2e_request_latency_seconds_count") == [
        'guiderail:e2e_request_latency_seconds_count{guide="score",model_name="fake"} 2.0'
    ]
    assert lines(metrics, "request_queue_time_seconds_count") == [
        'guiderail:request_queue_time_seconds_count{model_name="fake"} 2.0'
    ]


async def test_scores_wait_for_admission_and_are_refused_under_overload() -> None:
    gate = Gate()
    state = make_state(ScriptedEngine(), {"gate": gate}, max_num_seqs=1, limits={"max_queue": 1, "reserved_share": 0})
    chat = {"messages": [{"role": "user", "content": "q"}], "alignment": {"guide": "sampling", "rewards": ["gate"]}}
    async with serving(state) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        post: Callable[..., Any] = lambda: client.post("/v1/rewards/score", json=BODY)  # noqa: E731
        holder = asyncio.create_task(client.post("/v1/chat/completions", json=chat))
        await until(lambda: gate.calls == 1)
        waiter = asyncio.create_task(post())
        await until(lambda: state.admission.waiting == 1)
        assert state.admission.waiting_tokens == 8  # what the reward reads
        refused = await post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        metrics = (await client.get("/metrics")).text
        assert lines(metrics, "num_requests_waiting") == ['guiderail:num_requests_waiting{model_name="fake"} 1.0']
        gate.open.set()
        assert [(await each).status_code for each in (holder, waiter)] == [200, 200]
        metrics = (await client.get("/metrics")).text
    assert 'guiderail:requests_total{guide="score",model_name="fake",outcome="overloaded"} 1.0' in metrics
    assert lines(metrics, "num_requests_running") == ['guiderail:num_requests_running{model_name="fake"} 0.0']


async def test_a_client_that_leaves_gives_its_place_back() -> None:
    gate = Gate()
    state = make_state(ScriptedEngine(), {"gate": gate}, max_num_seqs=1)
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/rewards/score", json=BODY | {"rewards": ["gate"]}, timeout=0.2)
        await until(lambda: state.metrics.in_flight == 0)
        assert (await client.post("/v1/rewards/score", json=BODY)).status_code == 200
        metrics = (await client.get("/metrics")).text
    assert 'guiderail:requests_total{guide="score",model_name="fake",outcome="cancelled"} 1.0' in metrics


@pytest.mark.parametrize(
    ("rewards", "rows", "tokens"),
    [
        (["last_digit"], 1, 16),
        (["last_digit", "asks"], 4, 32 + 4 * 2),  # each answer that is asked about stands behind its prompt
        ([{"name": "last_digit", "transform": "calibrated"}], 2 * 8, 16 + 2 * 8 * 20),
        ([{"name": "asks", "transform": "calibrated"}], 4 + 2 * 8, 16 + 4 * 2 + 2 * 8 * 20),
    ],
)
def test_the_cost_is_what_the_engine_may_have_to_do(rewards: list[Any], rows: int, tokens: int) -> None:
    state = make_state(ScriptedEngine(), {"asks": Asks()})
    body = BODY | {"inputs": BODY["inputs"] * 2, "rewards": rewards, "calibration": {"n": 8}, "max_tokens": 20}
    work = scoring(state, ScoreRequest.model_validate(body))
    assert (work.rows, work.tokens) == (rows, tokens)
    stored = scoring(state, ScoreRequest.model_validate(body | {"calibration": {"source": "stored"}}))
    assert stored.tokens == tokens - (2 * 8 * 20 if rows >= 2 * 8 else 0), "nothing is drawn"


def test_what_a_judge_takes_of_the_engine_at_once_is_bounded_and_its_tokens_are_not() -> None:
    state = make_state(ScriptedEngine(), {"asks": Asks()}, max_num_seqs=128)
    body = BODY | {"inputs": [BODY["inputs"][0] | {"answers": ["w1"] * 1000}] * 4, "rewards": ["asks"]}
    work = scoring(state, ScoreRequest.model_validate(body))
    assert (work.rows, work.tokens) == (32, 4 * 1000 * (2 + 2))


class Counting(Reward):
    """Asks the engine about nothing; counts the groups that are being scored."""

    batched = False
    asks_engine = True
    running = peak = scored = 0

    async def score(self, groups: Any) -> list[ScoreResult]:
        self.running += 1
        self.peak = max(self.peak, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        self.scored += 1
        return [ScoreResult((1.0,) * len(group.answers)) for group in groups]


async def test_inputs_that_ask_the_engine_are_scored_a_few_at_a_time() -> None:
    reward = Counting()
    state = make_state(ScriptedEngine(), {"counting": reward})
    async with serving(state) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        body = BODY | {"inputs": BODY["inputs"] * 500, "rewards": ["counting"]}
        found = await client.post("/v1/rewards/score", json=body)
    assert [each["index"] for each in found.json()["data"]] == list(range(500))
    assert (reward.scored, reward.peak) == (500, 4)
