"""sampling and best_of_n over the scripted engine: choice, spend, limits, cancellation, failures."""

import asyncio
import time
from contextlib import aclosing
from typing import Any

import pytest
from contexts import context, final, run
from fakes import Faulty, ScriptedEngine
from virtual_time import in_virtual_time

from guiderail.guides.best_of_n import BestOfN
from guiderail.guides.core.errors import DeadlinePassed, EngineUnavailable, RewardFailed
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.metering import Limits
from guiderail.guides.core.seeds import Seeds
from guiderail.guides.core.types import SamplingSpec, Token, TokenPrompt
from guiderail.guides.sampling import Sampling


async def test_best_of_n_returns_the_argmax_and_counts_everything() -> None:
    ctx = context(ScriptedEngine())
    events = await run(BestOfN(BestOfN.Params(n=8)), ctx)
    end = final(events)
    assert [c.rewards["last_digit"] for c in end.candidates] == [0, 1, 2, 3, 4, 5, 6, 7]  # rows 10..17
    assert end.chosen == 7
    assert "".join(e.text for e in events if isinstance(e, Token)) == "w17 one two three"
    assert ctx.spend.tokens_generated == 8 * 4
    assert ctx.spend.rollouts == 8
    assert ctx.spend.reward_calls == 8
    assert end.stopped_by is None


async def test_choices_use_disjoint_seeds() -> None:
    drawn: list[str] = []
    for choice in range(3):
        end = final(await run(BestOfN(BestOfN.Params(n=4)), context(ScriptedEngine(), choice=choice)))
        drawn += [c.text.split()[0] for c in end.candidates]
    assert drawn[:4] == ["w10", "w11", "w12", "w13"]
    assert drawn[4:] == [f"w{seed}" for choice in (1, 2) for seed in Seeds(10, choice).stream(4)]
    assert len(set(drawn)) == 12


async def test_candidates_are_scored_as_they_finish() -> None:
    """The short answer is scored while the long ones are still being generated."""
    engine = ScriptedEngine(lambda seed: [f"w{seed}"] * (1 if seed == 10 else 20), step_s=0.01)
    reward = Faulty()
    ctx = context(engine, reward=reward)
    seen: list[int] = []
    original = reward.score

    async def spy(groups: Any) -> Any:
        seen.append(engine.num_running())
        return await original(groups)

    reward.score = spy  # type: ignore[method-assign]
    await run(BestOfN(BestOfN.Params(n=3)), ctx)
    assert seen[0] == 2


async def test_sampling_streams_and_reports_rewards_without_using_them() -> None:
    ctx = context(ScriptedEngine())
    events = await run(Sampling(Sampling.Params()), ctx)
    assert [e.text for e in events if isinstance(e, Token)] == ["w10", " one", " two", " three"]
    assert final(events).candidates[0].combined == 0.0


@in_virtual_time
async def test_deadline_returns_the_best_finished_answer_and_says_so() -> None:
    engine = ScriptedEngine(lambda seed: [f"w{seed}"] * (1 if seed < 12 else 1000), step_s=0.02)
    ctx = context(engine, limits=Limits(deadline=time.monotonic() + 0.2), sampling=SamplingSpec(2000, seed=10))
    end = final(await run(BestOfN(BestOfN.Params(n=4)), ctx))
    assert (end.stopped_by, end.chosen, end.finish_reason) == ("deadline", 1, "stop")
    assert [c.finish_reason for c in end.candidates] == ["stop", "stop", "deadline", "deadline"]
    assert engine.num_running() == 0


@in_virtual_time
async def test_deadline_with_nothing_finished_scores_what_there_is() -> None:
    engine = ScriptedEngine(lambda seed: [f"w{seed}"] * 1000, step_s=0.02)
    ctx = context(engine, limits=Limits(deadline=time.monotonic() + 0.2), sampling=SamplingSpec(2000, seed=10))
    end = final(await run(BestOfN(BestOfN.Params(n=3)), ctx))
    assert (end.stopped_by, end.chosen, end.finish_reason) == ("deadline", 2, "length")


@pytest.mark.parametrize("guide", [Sampling(Sampling.Params()), BestOfN(BestOfN.Params(n=3))])
@in_virtual_time
async def test_deadline_before_the_first_token_is_an_error(guide: Guide) -> None:
    engine = ScriptedEngine(step_s=10)
    with pytest.raises(DeadlinePassed):
        await run(guide, context(engine, limits=Limits(deadline=time.monotonic() + 0.05)))
    assert engine.num_running() == 0


async def test_token_budget_stops_generation_within_one_token_a_row() -> None:
    engine = ScriptedEngine(lambda seed: [f"w{seed}"] * 1000, step_s=0.001)
    ctx = context(engine, limits=Limits(max_tokens_generated=30), sampling=SamplingSpec(900, seed=10))
    end = final(await run(BestOfN(BestOfN.Params(n=3)), ctx))
    assert end.stopped_by == "budget"
    assert 30 <= ctx.spend.tokens_generated <= 33
    assert engine.num_running() == 0


@pytest.mark.parametrize("guide", [Sampling(Sampling.Params()), BestOfN(BestOfN.Params(n=5))])
async def test_closing_a_guide_frees_its_rows_at_once(guide: Guide) -> None:
    engine = ScriptedEngine(lambda seed: [f"w{seed}"] * 1000, step_s=0.005)
    ctx = context(engine, sampling=SamplingSpec(2000, seed=10))

    async def consume() -> None:
        async with aclosing(guide.run(ctx)) as events:
            async for _ in events:
                pass

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.05)
    assert engine.num_running() == guide.candidates()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.num_running() == 0


@pytest.mark.parametrize("fault", ["raise", "nan", "short"])
async def test_a_failing_reward_fails_loudly_and_frees_the_engine(fault: str) -> None:
    engine = ScriptedEngine(lambda seed: [f"w{seed}"] * (1 if seed == 10 else 1000), step_s=0.002)
    ctx = context(engine, reward=Faulty(fault), sampling=SamplingSpec(2000, seed=10))
    with pytest.raises(RewardFailed, match="last_digit"):
        await run(BestOfN(BestOfN.Params(n=3)), ctx)
    assert engine.num_running() == 0


async def test_engine_loss_is_raised_as_itself() -> None:
    with pytest.raises(EngineUnavailable):
        await run(BestOfN(BestOfN.Params(n=3)), context(ScriptedEngine(fail_after=2)))


async def test_dropping_a_row_ends_only_that_row() -> None:
    engine = ScriptedEngine(lambda seed: [f"w{seed}"] * 20, step_s=0.005)
    ends: dict[int, str | None] = {}
    async with engine.generate([TokenPrompt((1,))] * 3, SamplingSpec(100), seeds=[1, 2, 3]) as rollouts:
        async for delta in rollouts:
            if delta.row == 1 and 1 not in ends:
                await rollouts.drop(1)
            if delta.finish_reason:
                ends[delta.row] = delta.finish_reason
    assert ends == {0: "stop", 1: "dropped", 2: "stop"}
