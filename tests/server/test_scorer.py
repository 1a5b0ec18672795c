"""The BatchingScorer: batching across requests, isolation of failures, cancellation, time limit."""

import asyncio

import pytest
from fakes import Faulty

from guiderail.guides import ScoreResult
from guiderail.guides.errors import EngineUnavailable, RewardFailed
from guiderail.guides.types import Answer, Message, ScoreGroup, TokenPrompt
from guiderail.server.metrics import Metrics
from guiderail.server.scorer import BatchingScorer


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
