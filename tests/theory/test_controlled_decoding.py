"""Controlled decoding: Transfer Q* with the base policy as baseline, and best-of-K when a block holds the answer."""

from typing import Any

import numpy as np
import pytest
from contexts import final, run
from exact_distribution import led
from tabular import aligned, from_rule, guided, q_values, random_policy, random_reward
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.best_of_n import BestOfN
from guiderail.guides.controlled_decoding import ControlledDecoding
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.core.types import Candidate, Event, SamplingSpec, Scored
from guiderail.guides.scoring.selection.best import Softmax
from guiderail.guides.scoring.selection.rule import Selection
from guiderail.guides.transfer_q import TransferQ

PI0 = random_policy(20, horizon=6, spread=0.7)
R = random_reward(PI0, 120)


def decoding(**params: Any) -> ControlledDecoding:
    return ControlledDecoding(ControlledDecoding.Params(**params))


async def play(guide: Guide, seed: int, scores: Scores | None = None, **more: Any) -> tuple[list[Event], Any]:
    engine = TabularEngine.of(PI0, adapters={"adapter": aligned(PI0, R, 0.1)})
    ctx = tabular_context(
        engine,
        scores or Scores({"r": R}, partial=lambda ids: sum(ids) / 20),
        sampling=SamplingSpec(6, seed=seed),
        **more,
    )
    return await run(guide, ctx), ctx


def considered(events: list[Event]) -> list[tuple[Candidate, ...]]:
    return [event.candidates for event in events if isinstance(event, Scored)]


@pytest.mark.parametrize("selection", [Softmax(beta=0.2), None], ids=["softmax", "argmax"])
@pytest.mark.parametrize(("block", "rollouts", "horizon"), [(2, 3, None), (2, 1, 2), (3, 2, 1), (4, 1, 20)])
async def test_it_is_transfer_q_with_the_policy_as_its_own_baseline(
    block: int, rollouts: int, horizon: int | None, selection: Selection | None
) -> None:
    """The same draws, values, choices and spend for the same seed; not so with another baseline."""
    more = {} if selection is None else {"selection": selection}
    differs = 0
    for seed in range(15):
        own, ctx = await play(decoding(k=5, block=block, rollouts=rollouts, horizon=horizon), seed, **more)
        spec = {"top_k": 5, "block": block, "rollouts": rollouts, "lookahead": horizon, "alpha": 1.0}
        transfer, other = await play(TransferQ(TransferQ.Params(**spec)), seed, **more)
        assert own == transfer
        assert ctx.spend.tokens_generated == other.spend.tokens_generated
        assert ctx.spend.reward_calls == other.spend.reward_calls
        spec["baseline"] = PolicySpec(model="adapter")
        differs += own != (await play(TransferQ(TransferQ.Params(**spec)), seed, **more))[0]
    assert differs > 5


async def test_many_draws_of_one_token_tend_to_the_distribution_of_transfer_q() -> None:
    """pi0(z) exp(Q(z) / beta), where the prior comes from the draws: here and in log pi0 + Q / alpha there."""
    pi0 = from_rule(lambda s: np.array([0.1, 0.2, 0.3, 0.4]) if not s else np.eye(4)[(sum(s) * 7) % 3 + 1], 4)
    reward = random_reward(pi0, 5)
    q = q_values(pi0, reward)
    exact = guided(pi0, q, 0.2).distribution(())
    engine, scores = TabularEngine.of(pi0), Scores({"r": reward})
    distributions = []
    for seed in range(25):
        ctx = tabular_context(engine, scores, selection=Softmax(beta=0.2), sampling=SamplingSpec(4, seed=seed))
        events = await run(decoding(k=200, block=1, rollouts=1), ctx)
        first = considered(events)[0]
        distributions.append([sum(c.weight or 0.0 for c in first if c.token_ids == (z,)) for z in range(4)])
    error = np.std(distributions, axis=0) / np.sqrt(len(distributions))
    assert (np.abs(np.mean(distributions, axis=0) - exact) < 4 * error + 0.002).all()
    assert np.abs(exact - pi0.distribution(())).max() > 0.1
    transfer = TransferQ(TransferQ.Params(top_k=4, lookahead=None, alpha=0.2))
    distribution, _ = await led(transfer, engine, scores, (0,), 4, seed=1)
    assert [distribution[0][z] for z in range(4)] == pytest.approx(list(exact))


@pytest.mark.parametrize("selection", [Softmax(beta=0.2), None], ids=["softmax", "argmax"])
@pytest.mark.parametrize("block", [6, 32])
async def test_a_block_that_holds_the_answer_is_best_of_k(block: int, selection: Selection | None) -> None:
    more = {} if selection is None else {"selection": selection}
    for seed in range(10):
        best, spent = await play(BestOfN(BestOfN.Params(n=7)), seed, **more)
        for guide in (
            decoding(k=7, block=block),
            decoding(k=7, block=block, rollouts=2),  # there is nothing left to roll out
            TransferQ(TransferQ.Params(top_k=7, block=block)),
        ):
            events, ctx = await play(guide, seed, **more)
            (candidates,) = considered(events)
            assert candidates == considered(best)[0]
            chosen = final(best).candidates[final(best).chosen]
            answer = final(events).candidates[0]
            assert (answer.token_ids, answer.text, answer.rewards) == (chosen.token_ids, chosen.text, chosen.rewards)
            assert answer.finish_reason == chosen.finish_reason
            assert ctx.spend.tokens_generated == spent.spend.tokens_generated
            assert ctx.report.kl == spent.report.kl


async def test_a_block_is_valued_by_the_answer_so_far_and_the_best_is_kept() -> None:
    scores = Scores({"r": R}, partial=lambda ids: sum((4 - z) / 10**t for t, z in enumerate(ids)))
    events, _ = await play(decoding(k=5, block=2), 3, scores)
    answer = final(events).candidates[0].token_ids
    for step, candidates in enumerate(considered(events)):
        values = [scores.partial(c.token_ids) if not c.finished else R[c.token_ids] for c in candidates]
        assert [c.combined for c in candidates] == pytest.approx(values)
        best = candidates[int(np.argmax(values))].token_ids
        assert answer[: len(best)] == best
        assert all(c.token_ids[: 2 * step] == answer[: 2 * step] for c in candidates)
