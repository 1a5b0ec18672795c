"""The BatchingScorer: batching across requests, isolation of failures, cancellation, time limit."""

import asyncio
import itertools
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import Faulty, ScriptedEngine, make_state

from guiderail.guides import Reward, ScoreResult, TextReward
from guiderail.guides.controlled_decoding import ControlledDecoding
from guiderail.guides.core.errors import EngineUnavailable, RewardFailed
from guiderail.guides.core.tasks import MOST_THREADS
from guiderail.guides.core.types import Answer, Message, ScoreGroup, TokenPrompt
from guiderail.guides.scoring import pipeline
from guiderail.server.api.app import create_app
from guiderail.server.metrics import Metrics
from guiderail.server.scoring import batcher
from guiderail.server.scoring.batcher import BatchingScorer


def group(text: str = "x", answers: int = 1) -> ScoreGroup:
    return ScoreGroup((Message("user", "q"),), TokenPrompt((1,)), (Answer(text),) * answers, None)


def scorer(reward: Faulty, **options: float) -> BatchingScorer:
    return BatchingScorer({"r": reward}, Metrics("fake"), **options)  # type: ignore[arg-type]


async def test_concurrent_calls_share_a_batch() -> None:
    reward = Faulty()
    queue = scorer(reward)
    results = await asyncio.gather(*(queue.score("r", group(answers=2)) for _ in range(10)))
    assert [r.values for r in results] == [(1.0, 1.0)] * 10
    assert reward.batches == [10]


async def test_a_batch_is_bounded_and_a_larger_group_goes_alone() -> None:
    reward = Faulty()
    queue = scorer(reward, max_tokens=4)  # a group costs its prompt's one token and nothing for answers of one letter
    await asyncio.gather(*(queue.score("r", group()) for _ in range(6)), queue.score("r", group("x" * 400)))
    assert reward.batches == [4, 2, 1]


async def test_requests_take_turns() -> None:
    """A request with many groups does not keep another's single group out of the first batch."""
    reward = Faulty()
    order: list[str] = []
    original = reward.score

    async def spy(groups: list[ScoreGroup]) -> list[ScoreResult]:
        order.extend(g.answers[0].text for g in groups)
        return await original(groups)

    reward.score = spy  # type: ignore[method-assign,assignment]
    queue = scorer(reward, max_tokens=2)
    many = [queue.score("r", group("a"), owner=1) for _ in range(4)]
    await asyncio.gather(*many, queue.score("r", group("b"), owner=2))
    assert order == ["a", "b", "a", "a", "a"]


async def test_a_failing_group_fails_alone() -> None:
    queue = scorer(Faulty("bad-group"))
    results = await asyncio.gather(
        *(queue.score("r", group(text)) for text in ("good", "bad", "fine")), return_exceptions=True
    )
    assert isinstance(results[1], RewardFailed)
    assert "'r'" in str(results[1])
    assert [r.values for r in (results[0], results[2])] == [(1.0,), (1.0,)]  # type: ignore[union-attr]


async def test_work_of_a_cancelled_caller_is_dropped() -> None:
    reward = Faulty()
    queue = scorer(reward)
    task = asyncio.create_task(queue.score("r", group()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await queue.score("r", group())
    assert reward.batches == [1]


async def test_a_batch_that_nobody_waits_for_any_more_is_ended() -> None:
    """So that it does not keep the calls behind it for as long as a reward may take."""
    reward = Faulty("hang")
    queue = scorer(reward, timeout_s=3000)
    tasks = [asyncio.create_task(queue.score("r", group())) for _ in range(2)]
    while not reward.batches:
        await asyncio.sleep(0.001)
    tasks[0].cancel()
    await asyncio.sleep(0.01)
    assert reward.batches == [2]
    reward.fault = ""
    tasks[1].cancel()
    async with asyncio.timeout(60):
        assert (await queue.score("r", group())).values == (1.0,)


async def test_a_reward_that_hangs_fails_by_name_and_the_queue_goes_on() -> None:
    reward = Faulty("hang")
    queue = scorer(reward, timeout_s=0.05)
    with pytest.raises(RewardFailed, match=r"'r'.*0\.05 s"):
        await queue.score("r", group())
    reward.fault = ""
    assert (await queue.score("r", group())).values == (1.0,)


async def test_a_lost_engine_reaches_every_caller_of_a_batch() -> None:
    """Nobody is left waiting, and the queue goes on."""
    reward = Faulty("engine")
    queue = scorer(reward)
    async with asyncio.timeout(5):
        results = await asyncio.gather(*(queue.score("r", group()) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, EngineUnavailable) for result in results)
    reward.fault = ""
    assert (await queue.score("r", group())).values == (1.0,)


class Returns(Reward):
    """Returns, or raises, what it is given, for groups whose answer is "bad"; 1 for others."""

    def __init__(self, what: Any, *, batched: bool = True) -> None:
        self.what = what
        self.batched = batched  # type: ignore[misc]

    async def score(self, groups: Sequence[ScoreGroup]) -> Any:
        if not any(answer.text == "bad" for group in groups for answer in group.answers):
            return [ScoreResult((1.0,) * len(group.answers)) for group in groups]
        if isinstance(self.what, BaseException):
            raise self.what
        if self.what == "deaf":
            await deaf()
        if callable(self.what):
            return self.what(groups)
        return [ScoreResult(self.what) for _ in groups]


async def deaf() -> None:
    """Never return, whoever asks, for a minute."""
    end = asyncio.get_running_loop().time() + 60
    while (left := end - asyncio.get_running_loop().time()) > 0:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(left)


class Unspeakable(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise RuntimeError("not even that")

    __repr__ = __str__

    def __float__(self) -> float:
        raise KeyError("odd")


WRONG: list[Any] = [
    (np.array([1.0]),), (np.ones((1, 1)),), np.ones((1, 1)), (np.array("high"),), (bytearray(b"1"),), (Unspeakable(),),
    (np.nan,), itertools.count(), Unspeakable(), SystemExit(3),
    lambda groups: [ScoreResult((1.0,), -1)] * len(groups), lambda groups: [ScoreResult((1.0,), 10**400)] * len(groups),
    lambda groups: [ScoreResult((1.0,), 1, None)] * len(groups), lambda groups: [ScoreResult((1.0,), 1, "text")] * len(groups),
    lambda groups: [ScoreResult((1.0,), 1, (3,))] * len(groups), lambda groups: Unspeakable(),
    ("high",), ("1.0",), (None,), (b"1",), (1j,), ([1.0],), (object(),), (float("nan"),), (float("inf"),), (1e101,),
    (-(10**400),), (), (1.0, 2.0), None, 3.0, "x" * 2,
    lambda groups: None, lambda groups: 1.0, lambda groups: [], lambda groups: [1.0] * len(groups),
    lambda groups: [(1.0,)] * len(groups), lambda groups: {"r": 1.0}, lambda groups: "high",
    lambda groups: [ScoreResult((1.0,))] * (len(groups) + 1), lambda groups: [ScoreResult((1.0,), "many")] * len(groups),
    StopIteration(), KeyError("missing"), asyncio.CancelledError(), AssertionError(), RecursionError(),
    TimeoutError(), GeneratorExit(),
]  # fmt: skip


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "alone"])
@pytest.mark.parametrize("what", WRONG, ids=[type(what).__name__ for what in WRONG])
async def test_whatever_a_reward_returns_or_raises_fails_its_own_request_by_name(what: Any, batched: bool) -> None:
    queue = BatchingScorer({"r": Returns(what, batched=batched)}, Metrics("fake"), timeout_s=30)
    async with asyncio.timeout(10):
        bad, good = await asyncio.gather(
            queue.score("r", group("bad")), queue.score("r", group("good")), return_exceptions=True
        )
    assert isinstance(bad, RewardFailed)
    assert "'r'" in str(bad)
    assert isinstance(good, ScoreResult)
    async with asyncio.timeout(10):
        assert (await queue.score("r", group("good"))).values == (1.0,)


@pytest.mark.parametrize("value", [1, True, np.float32(0.5), np.int64(3), 2.5, np.array(1.5)], ids=repr)
async def test_whatever_is_a_number_is_a_value(value: Any) -> None:
    queue = BatchingScorer({"r": Returns((value,))}, Metrics("fake"))
    (found,) = (await queue.score("r", group("bad"))).values
    assert type(found) is float
    assert found == float(value)


async def test_a_text_reward_that_gives_no_number_is_a_named_500_over_http() -> None:
    class High(TextReward):
        """No number."""

        def score_text(self, prompt: str, answer: str, params: Any) -> Any:
            return "high"

    app = create_app(make_state(ScriptedEngine(), {"high": High()}))
    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        asyncio.timeout(20),
    ):
        chat = {"messages": [{"role": "user", "content": "q"}], "alignment": {"rewards": ["high"]}}
        scored = {"inputs": [{"messages": chat["messages"], "answers": ["a"]}], "rewards": ["high"]}
        for path, body in (("/v1/chat/completions", chat), ("/v1/rewards/score", scored)):
            answer = await client.post(path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (500, "reward_failed", "high")
            assert "reward 'high' failed: it returned 'high', which is no number" in error["message"]


async def test_without_a_limit_a_slow_reward_is_waited_for() -> None:
    reward = Faulty()
    original = reward.score

    async def slow(groups: list[ScoreGroup]) -> list[ScoreResult]:
        await asyncio.sleep(0.2)
        return await original(groups)

    reward.score = slow  # type: ignore[method-assign,assignment]
    queue = scorer(reward, timeout_s=0.05)
    with pytest.raises(RewardFailed, match="no scores within"):
        await queue.score("r", group())
    queue.timeout_s = None
    assert (await queue.score("r", group())).values == (1.0,)


async def test_a_reward_that_takes_no_notice_of_its_end_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "END_S", 0.01)
    queue = BatchingScorer({"r": Returns("deaf")}, Metrics("fake"), timeout_s=0.05)
    async with asyncio.timeout(30):
        with pytest.raises(RewardFailed, match=r"'r'.*0\.05 s"):
            await queue.score("r", group("bad"))
        assert (await queue.score("r", group("good"))).values == (1.0,)


async def test_an_error_of_the_queue_itself_reaches_everybody_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = scorer(Faulty())

    def broken(name: str) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(queue, "_take", broken)
    async with asyncio.timeout(30):
        results = await asyncio.gather(*(queue.score("r", group()) for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == [
        "reward 'r' failed: its queue was cut off by ZeroDivisionError: a fault of ours"
    ] * 3
    monkeypatch.undo()
    assert (await queue.score("r", group())).values == (1.0,)


@pytest.mark.parametrize("debug", [True, False])
async def test_under_debug_an_error_says_where_it_was_raised(debug: bool) -> None:
    queue = BatchingScorer({"r": Faulty("raise")}, Metrics("fake"), debug=debug)
    with pytest.raises(RewardFailed) as failure:
        await queue.score("r", group())
    assert str(failure.value).startswith("reward 'r' failed: RuntimeError: broken on purpose")
    assert ("(fakes.py:" in str(failure.value)) == debug


class Sleeps(TextReward):
    """Never returns where the answer is "bad", until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def score_text(self, prompt: str, answer: str, params: Any) -> float:
        if answer == "bad":
            self.let_go.wait(60)
        return 1.0


async def test_a_text_reward_that_never_returns_keeps_neither_its_queue_nor_other_threads() -> None:
    reward = Sleeps()
    queue = BatchingScorer({"r": reward}, Metrics("fake"), timeout_s=0.05)
    try:
        async with asyncio.timeout(50):
            for _ in range(MOST_THREADS - 1):
                with pytest.raises(RewardFailed, match=r"0\.05 s"):
                    await queue.score("r", group("bad"))
            queue.timeout_s = 40
            assert (await queue.score("r", group("good"))).values == (1.0,)
            assert await asyncio.to_thread(lambda: 3) == 3
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "guiderail-call")
    finally:
        reward.let_go.set()


async def test_a_reward_that_never_returns_is_bounded_by_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in guides that wait for the scores of each step."""
    monkeypatch.setattr(pipeline, "LATE_S", 0.05)
    state = make_state(ScriptedEngine(), {"hangs": Faulty("hang")})
    state.resolver._guides["controlled_decoding"] = ControlledDecoding
    alignment = {"guide": {"name": "controlled_decoding", "k": 2}, "rewards": ["hangs"], "budget": {"deadline_s": 0.5}}
    chat = {"messages": [{"role": "user", "content": "q"}], "alignment": alignment}
    scored = {"inputs": [{"messages": chat["messages"], "answers": ["a"]}], "rewards": ["hangs"]}
    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(create_app(state)), base_url="http://test") as client,
        asyncio.timeout(55),
    ):
        answer = await client.post("/v1/chat/completions", json=chat)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "reward 'hangs'" in answer.json()["error"]["message"]
        state.scorer.timeout_s = 0.05
        answer = await client.post("/v1/rewards/score", json=scored)
        assert (answer.status_code, answer.json()["error"]["param"]) == (500, "hangs")
