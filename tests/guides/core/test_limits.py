"""Deadline and token budget, cancellation and faults, in every guide."""

import asyncio
import itertools
from contextlib import aclosing
from typing import Any

import pytest
from contexts import final, run
from every_guide import EVERY, REWARDS, STEPWISE, Endless, Values, random_scores
from tabular_context import Scores, tabular_context
from tabular_engine import Clock, TabularEngine

from guiderail.guides.best_of_n import BestOfN
from guiderail.guides.controlled_decoding import ControlledDecoding
from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import DeadlinePassed, EngineUnavailable, FieldError, RewardFailed
from guiderail.guides.core.metering import Limits, Spend
from guiderail.guides.core.types import SamplingSpec, Scored, Token
from guiderail.guides.deal import Deal
from guiderail.guides.sampling import Sampling
from guiderail.guides.transfer_q import TransferQ

ROWS = 24  # more than any of the guides has in the engine at once


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that guides see: one second a step of the engine."""
    clock = Clock()
    monkeypatch.setattr("guiderail.guides.core.metering.time", clock)
    return clock


def served(*, end: float = 0.0, **more: Any) -> TabularEngine:
    return TabularEngine({None: Endless(seed=3, end=end), "adapter": Endless(seed=4, end=end)}, **more)


def prepared(engine: TabularEngine, scores: Any = None, *, max_tokens: int = 40, seed: int = 1, **more: Any) -> Context:
    sampling = SamplingSpec(max_tokens, seed=seed)
    return tabular_context(engine, scores or random_scores(), weights=REWARDS, **({"sampling": sampling} | more))


@pytest.mark.parametrize("name", EVERY)
async def test_at_the_deadline_the_answer_so_far_is_returned_and_that_is_said(name: str, clock: Clock) -> None:
    engine = served(clock=clock)
    events = await run(EVERY[name](), prepared(engine, max_tokens=400, limits=Limits(deadline=50.5)))
    end = final(events)
    assert 51 <= clock.now <= 51 + 3  # the beams of DeAL each finish their step
    assert engine.num_running() == 0
    assert (end.stopped_by, end.finish_reason) == ("deadline", "length")
    answer = end.candidates[end.chosen]
    assert answer.token_ids
    assert set(answer.rewards) == set(REWARDS)
    assert "".join(e.text for e in events if isinstance(e, Token)) == answer.text


@pytest.mark.parametrize("name", EVERY)
async def test_a_deadline_before_the_first_token_is_an_error(name: str, clock: Clock) -> None:
    engine = served(clock=clock)
    with pytest.raises(DeadlinePassed):
        await run(EVERY[name](), prepared(engine, limits=Limits(deadline=0.0)))
    assert engine.num_running() == 0


@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize("name", EVERY)
async def test_a_token_budget_is_kept_and_reported(name: str, end: float) -> None:
    """Whatever it is: within one token a row, and only said to have stopped an answer that it did stop."""
    free = prepared(served(end=end), max_tokens=12)
    unbounded = final(await run(EVERY[name](), free))
    full = free.spend.tokens_generated
    for budget in sorted({1, 2, 3, 5, 8, 13, 21, 34, 55, 89, full // 2, full - 1, full + ROWS}):
        engine = served(end=end)
        ctx = prepared(engine, max_tokens=12, limits=Limits(max_tokens_generated=budget))
        try:
            events = await run(EVERY[name](), ctx)
        except FieldError:
            assert budget < 8
            continue
        finally:
            assert engine.num_running() == 0
            assert ctx.spend.tokens_generated < budget + ROWS
        found = final(events)
        answer = found.candidates[found.chosen]
        assert answer.token_ids
        assert sum((e.token_ids for e in events if isinstance(e, Token)), ()) == answer.token_ids
        if found.stopped_by is None:
            assert budget > full - ROWS
            assert answer.token_ids == unbounded.candidates[unbounded.chosen].token_ids
        else:
            assert found.stopped_by == "budget"
            assert budget < full + ROWS
            assert found.finish_reason == (answer.finish_reason if answer.finished else "length")


async def test_several_answers_of_a_request_share_its_budget() -> None:
    """Though each of them alone would fit."""
    budget = 100
    for name in EVERY:
        engine, spend = served(clock=Clock()), Spend()
        limits = Limits(max_tokens_generated=budget)
        contexts = [prepared(engine, max_tokens=16, limits=limits, spend=spend, choice=i) for i in range(4)]
        await asyncio.gather(*(run(EVERY[name](), ctx) for ctx in contexts), return_exceptions=True)
        assert spend.tokens_generated < budget + 4 * ROWS
        assert engine.num_running() == 0


async def test_of_a_step_that_is_cut_short_the_best_whole_answer_is_taken() -> None:
    """As best-of-n does, of which a block that holds the answer is a case."""
    whole = 0
    for seed in range(8):
        answers = []
        for guide in (
            BestOfN(BestOfN.Params(n=12)),
            ControlledDecoding(ControlledDecoding.Params(k=12, block=60)),
            TransferQ(TransferQ.Params(top_k=12, block=60)),
        ):
            limits = Limits(max_tokens_generated=70)
            end = final(await run(guide, prepared(served(end=0.1), seed=seed, max_tokens=60, limits=limits)))
            answer = end.candidates[end.chosen]
            answers.append((answer.token_ids, end.finish_reason, end.stopped_by, answer.rewards))
        assert answers[0] == answers[1] == answers[2]
        assert answers[0][2] == "budget"
        whole += answers[0][1] == "stop"
    assert whole >= 4


async def test_a_block_that_ended_before_the_deadline_is_taken_and_not_a_longer_one(clock: Clock) -> None:
    ctx = prepared(served(end=0.1, clock=clock), max_tokens=90, limits=Limits(deadline=9.5))
    end = final(await run(ControlledDecoding(ControlledDecoding.Params(k=20, block=90)), ctx))
    assert (end.stopped_by, end.finish_reason) == ("deadline", "stop")
    assert end.candidates[0].token_ids[-1] == 0


async def test_deal_returns_its_best_beam_at_a_limit_a_whole_one_first() -> None:
    """It is a beam that the search kept, not continued by anything of the step that was cut short."""
    partial = whole = second = 0
    for budget, chance in itertools.product(range(20, 200, 5), (0.15, 0.03)):
        ctx = prepared(served(end=chance), max_tokens=30, limits=Limits(max_tokens_generated=budget))
        events = await run(Deal(Deal.Params(beams=4, top_k=5, lookahead=3)), ctx)
        end, (answer,) = final(events), final(events).candidates
        if end.stopped_by is None:
            continue
        considered = [event for event in events if isinstance(event, Scored)][-1].candidates
        kept = sorted(considered, key=lambda c: -c.combined)[:4]
        best = next((c for c in kept if c.finished), kept[0])
        assert (answer.token_ids, answer.finish_reason) == (best.token_ids, best.finish_reason)
        assert end.finish_reason == ("stop" if best.finished else "length")
        partial += not best.finished
        whole += best.finished
        second += best is not kept[0]
    assert partial >= 10
    assert whole > second >= 1


@pytest.mark.parametrize("name", EVERY)
async def test_cancelling_frees_every_row(name: str) -> None:
    for steps in (0, 1, 2, 5, 9, 17):
        engine = served(clock=Clock())
        ctx = prepared(engine, max_tokens=400)

        async def consume(ctx: Context = ctx) -> None:
            async with ctx, aclosing(EVERY[name]().run(ctx)) as events:
                async for _ in events:
                    pass

        task = asyncio.create_task(consume())
        while engine.tokens <= steps * 3 or not engine.num_running():
            await asyncio.sleep(0)
        assert engine.num_running() > 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert engine.num_running() == 0


@pytest.mark.parametrize("name", STEPWISE)
async def test_closing_after_the_first_text_frees_every_row(name: str) -> None:
    engine = served()
    ctx = prepared(engine, max_tokens=400)
    async with aclosing(EVERY[name]().run(ctx)) as events:
        async for event in events:
            if isinstance(event, Token):
                break
    assert engine.num_running() == 0


@pytest.mark.parametrize("name", EVERY)
async def test_a_lost_engine_is_raised_as_itself(name: str) -> None:
    for tokens in (0, 1, 4, 11, 30):
        engine = served(fail_after=tokens)
        with pytest.raises(EngineUnavailable, match="died"):
            await run(EVERY[name](), prepared(engine))
        assert engine.num_running() == 0


@pytest.mark.parametrize("name", EVERY)
async def test_a_failing_reward_is_raised_by_its_name(name: str) -> None:
    for good in (0, 1, 3):

        class Failing(Scores):
            async def score(self, reward: str, group: Any, owner: int = 0, good: int = good) -> Any:
                if self.calls >= good and reward == "r":
                    raise RewardFailed(reward, "broken on purpose")
                return await super().score(reward, group, owner)

        engine = served()
        values = {name: Values(1) for name in REWARDS}
        with pytest.raises(RewardFailed, match="'r'"):
            await run(EVERY[name](), prepared(engine, Failing(values, partial=Values(2).__getitem__)))
        assert engine.num_running() == 0


async def test_plain_sampling_is_stopped_by_the_same_budget() -> None:
    end = final(await run(Sampling(Sampling.Params()), prepared(served(), limits=Limits(max_tokens_generated=7))))
    assert (len(end.candidates[0].token_ids), end.stopped_by) == (7, "budget")
