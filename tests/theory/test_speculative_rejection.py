"""Speculative rejection against best-of-N, and against the rule of keeping the best of the pool at each checkpoint."""

import random
from typing import Any

import numpy as np
import pytest
from contexts import final, run
from tabular import Ids, ends, random_policy, random_reward
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.best_of_n import BestOfN
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import Final, SamplingSpec
from guiderail.guides.scoring.selection.best import Softmax
from guiderail.guides.speculative_rejection import SpeculativeRejection

HORIZON = 7
PI0 = random_policy(20, horizon=HORIZON, spread=0.7)
R = random_reward(PI0, 3)


def rejection(**params: Any) -> SpeculativeRejection:
    return SpeculativeRejection(SpeculativeRejection.Params(**params))


async def play(
    guide: Guide, seed: int, scores: Scores | None = None, pace: random.Random | None = None, **more: Any
) -> tuple[Final, Any]:
    ctx = tabular_context(
        TabularEngine.of(PI0, pace=pace), scores or Scores({"r": R}), sampling=SamplingSpec(HORIZON, seed=seed), **more
    )
    return final(await run(guide, ctx)), ctx


@pytest.mark.parametrize("interval", [1, 2, 3, 100])
async def test_without_rejection_it_is_best_of_n(interval: int) -> None:
    for seed in range(10):
        for more in ({}, {"selection": Softmax(beta=0.3)}):
            best, spent = await play(BestOfN(BestOfN.Params(n=8)), seed, **more)
            end, ctx = await play(rejection(n=8, alpha=0.0, interval=interval), seed, **more)
            assert end == best
            assert ctx.spend.tokens_generated == spent.spend.tokens_generated


async def test_a_checkpoint_beyond_the_answers_rejects_nothing() -> None:
    best, _ = await play(BestOfN(BestOfN.Params(n=8)), 5)
    assert (await play(rejection(n=8, alpha=0.9, interval=HORIZON), 5))[0] == best


@pytest.mark.parametrize(("alpha", "keep"), [(0.5, 1), (0.3, 1), (0.8, 2), (0.99, 1)])
async def test_it_keeps_the_best_of_the_pool_at_each_checkpoint(alpha: float, keep: int) -> None:
    """Replayed with the rows of best-of-N: the same are rejected, at the same places, whatever the partial reward."""
    n, interval = 9, 2

    def partial(ids: Ids) -> float:
        return float(np.sin(1 + sum((t + 1) * z for t, z in enumerate(ids))))

    rejected_any = 0
    for seed in range(15):
        rows = [c.token_ids for c in (await play(BestOfN(BestOfN.Params(n=n)), seed))[0].candidates]
        alive, lengths = list(range(n)), {}
        for at in range(interval, HORIZON, interval):
            if not any(len(rows[i]) > at for i in alive):
                break
            kept = max(keep, round((1 - alpha) * len(alive)))
            if kept >= len(alive):
                continue
            value = {i: R[rows[i]] if len(rows[i]) <= at else partial(rows[i][:at]) for i in alive}
            order = sorted(alive, key=lambda i: -value[i])
            lengths |= {i: min(at, len(rows[i])) for i in order[kept:]}
            alive = sorted(order[:kept])
        best = max(alive, key=lambda i: R[rows[i]])
        end, ctx = await play(
            rejection(n=n, alpha=alpha, interval=interval, keep=keep), seed, Scores({"r": R}, partial)
        )
        assert end.chosen == best
        assert end.candidates[best].token_ids == rows[best]
        assert [len(c.token_ids) for c in end.candidates] == [lengths.get(i, len(rows[i])) for i in range(n)]
        assert {i for i, c in enumerate(end.candidates) if c.finish_reason == "rejected"} <= set(lengths)
        assert ctx.spend.tokens_generated == sum(len(c.token_ids) for c in end.candidates)
        rejected_any += any(c.finish_reason == "rejected" for c in end.candidates)
    assert rejected_any >= 10


@pytest.mark.parametrize("placed", [{"interval": 2}, {}, {"segments": 4}], ids=str)
async def test_the_answer_does_not_depend_on_which_row_is_faster(placed: dict[str, int]) -> None:
    """Rows that ran ahead, to their end too, are scored by what they had at the checkpoint; they only cost more."""
    partial = {"partial": lambda ids: float(np.sin(1 + sum((t + 1) * z for t, z in enumerate(ids))))}
    guide = rejection(n=9, alpha=0.4, **placed)
    more = 0
    for seed in range(15):
        end, ctx = await play(guide, seed, Scores({"r": R}, **partial))
        for paced in range(3):
            other, spent = await play(guide, seed, Scores({"r": R}, **partial), random.Random(paced))
            assert other.chosen == end.chosen
            chosen, same = other.candidates[end.chosen], end.candidates[end.chosen]
            assert (chosen.token_ids, chosen.rewards) == (same.token_ids, same.rewards)
            more += spent.spend.tokens_generated - ctx.spend.tokens_generated
    assert more > 0


async def test_partial_rewards_that_tell_the_final_one_find_the_best_of_n_for_less() -> None:
    """And those that tell the opposite do not: it rests on their correlation."""
    n = 16
    telling: dict[Ids, float] = {}  # each prefix's largest reward among this seed's rows
    tokens = full = agree = misled = 0
    for seed in range(20):
        best, spent = await play(BestOfN(BestOfN.Params(n=n)), seed)
        telling = {}
        for c in best.candidates:
            for t in range(1, len(c.token_ids)):
                prefix = c.token_ids[:t]
                telling[prefix] = max(telling.get(prefix, -1.0), R[c.token_ids])
        assert not any(ends(prefix, HORIZON) for prefix in telling)
        found = {}  # two are kept: rows with the best's own beginning tie with it
        for name, sign in (("right", 1.0), ("wrong", -1.0)):
            scores = Scores({"r": R}, lambda ids, sign=sign, telling=telling: sign * telling[ids])
            found[name], ctx = await play(rejection(n=n, interval=1, alpha=0.5, keep=2), seed, scores)
            tokens += ctx.spend.tokens_generated if sign > 0 else 0
        full += spent.spend.tokens_generated
        top = R[best.candidates[best.chosen].token_ids]
        agree += R[found["right"].candidates[found["right"].chosen].token_ids] == top
        misled += R[found["wrong"].candidates[found["wrong"].chosen].token_ids] < top
    assert agree == 20
    assert tokens < 0.6 * full
    assert misled >= 10
