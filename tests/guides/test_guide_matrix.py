"""Every guide with every selection rule and every combination; and several answers of one request."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from contexts import final, run
from every_guide import EVERY, STEPWISE, Endless, Values, random_scores
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.controlled_decoding import ControlledDecoding
from guiderail.guides.core.metering import Spend
from guiderail.guides.core.types import SamplingSpec, Token, TokenPrompt
from guiderail.guides.scoring import COMBINES, IDENTITY, SELECTIONS, parse_chain
from guiderail.guides.scoring.combine import PointwiseMin
from guiderail.guides.search.lookahead import Lookahead, roll_forward, value
from guiderail.guides.search.sequence import Piece
from guiderail.guides.search.transcript import Transcript

SELECTION_PARAMS: dict[str, dict[str, Any]] = {
    "argmax": {},
    "softmax": {"beta": 0.3},
    "best_of_poisson": {"mu": 3.0},
    "mbr": {"beta": 0.5},
    "likelihood": {"beta": 0.2, "per": "token"},
    "pessimism": {"beta": 0.2, "r_max": 100.0},
    "f_divergence": {"divergence": "jensen_shannon", "beta": 0.2},
    "tournament": {"format": "round_robin"},
}
COMBINE_PARAMS: dict[str, dict[str, Any]] = {
    "sum": {},
    "and": {},
    "maxmin": {"beta": 0.2},
    "pointwise_min": {},
    "constraints": {"objective": "r", "floors": {"s": 0.4}},
}
WEIGHTS = {"r": 1.0, "s": 2.0, "other": 0.0}
LOG_SIGMOID = parse_chain({"name": "log_sigmoid", "reference": {"value": 0.5}})


def scores() -> Scores:
    return Scores({name: Values(i) for i, name in enumerate(WEIGHTS)}, partial=Values(7).__getitem__)


def served(end: float = 0.1) -> TabularEngine:
    return TabularEngine({None: Endless(seed=1, end=end), "adapter": Endless(seed=2, end=end)})


def test_the_matrix_is_whole() -> None:
    assert set(SELECTION_PARAMS) == set(SELECTIONS)
    assert set(COMBINE_PARAMS) == set(COMBINES)


@pytest.mark.parametrize("combine", COMBINE_PARAMS)
@pytest.mark.parametrize("selection", SELECTION_PARAMS)
@pytest.mark.parametrize("name", EVERY)
async def test_every_guide_takes_every_rule_and_combination(name: str, selection: str, combine: str) -> None:
    engine, table = served(), scores()
    for seed in range(2):
        ctx = tabular_context(
            engine,
            table,
            weights=WEIGHTS,
            chain=LOG_SIGMOID if combine == "and" else IDENTITY,
            combine=COMBINES[combine](name=combine, **COMBINE_PARAMS[combine]),
            selection=SELECTIONS[selection](**SELECTION_PARAMS[selection]),
            sampling=SamplingSpec(9, seed=seed),
        )
        events = await run(EVERY[name](), ctx)
        end = final(events)
        answer = end.candidates[end.chosen]
        assert (end.finish_reason, end.stopped_by) == ("stop" if answer.token_ids[-1] == 0 else "length", None)
        assert 0 not in answer.token_ids[:-1]
        assert len(answer.token_ids) == 9 or answer.token_ids[-1] == 0
        assert answer.rewards == {label: table.rewards[label][answer.token_ids] for label in WEIGHTS}
        assert answer.combined is not None
        assert math.isfinite(answer.combined)
        assert "".join(e.text for e in events if isinstance(e, Token)) == answer.text
        assert ctx.report.picks > 0
        assert math.isfinite(ctx.report.kl)


@pytest.mark.parametrize("name", EVERY)
async def test_the_same_seed_gives_the_same_answer_and_another_another(name: str) -> None:
    answers = []
    for seed in (1, 1, *range(1000, 9000, 1000)):
        softmax = SELECTIONS["softmax"](beta=1.0)
        ctx = tabular_context(
            served(), scores(), weights=WEIGHTS, sampling=SamplingSpec(9, seed=seed), selection=softmax
        )
        end = final(await run(EVERY[name](), ctx))
        answers.append(end.candidates[end.chosen].token_ids)
    assert answers[0] == answers[1]
    assert len(set(answers)) > (1 if name.startswith("deal-") else 4)  # beams are chosen without chance


@pytest.mark.parametrize("name", EVERY)
async def test_the_answers_of_one_request_draw_with_seeds_of_their_own(name: str) -> None:
    """No prompt is continued twice with the same seed, among all answers and steps."""

    drawn: list[tuple[TokenPrompt, int | None]] = []

    class Spy(TabularEngine):
        def generate(self, prompts: Any, sampling: Any, *, seeds: Sequence[Any] | None = None, **more: Any) -> Any:
            assert seeds is not None
            drawn.extend(zip(prompts, seeds, strict=True))
            return super().generate(prompts, sampling, seeds=seeds, **more)

    engine, spend = Spy(served().policies), Spend()
    contexts = [
        tabular_context(
            engine, random_scores(), weights={"r": 1.0, "other": 0.0}, sampling=SamplingSpec(9, seed=5), choice=i,
            spend=spend,
        )
        for i in range(4)
    ]  # fmt: skip
    ends = [final(events) for events in await asyncio.gather(*(run(EVERY[name](), ctx) for ctx in contexts))]
    assert len(ends) == 4
    assert engine.num_running() == 0
    assert len(set(drawn)) == len(drawn)
    if name not in ("args", "deal", "deal-beams", "deal-no-lookahead"):  # nothing is drawn there
        assert len({end.candidates[end.chosen].token_ids for end in ends}) > 1


async def test_seeds_stay_apart_where_one_answer_has_fewer_rollouts_to_draw_than_another() -> None:
    seeds: list[int | None] = []

    class Spy(TabularEngine):
        def generate(self, prompts: Any, sampling: Any, **more: Any) -> Any:
            seeds.extend(more["seeds"])
            return super().generate(prompts, sampling, **more)

    for choice in range(4):
        ctx = tabular_context(Spy(served().policies), scores(), sampling=SamplingSpec(9, seed=1), choice=choice)
        pieces = [Piece("", [z], [], "length") for z in (1, 2, 3)]
        there = [Piece("", [0], [], "stop") for _ in range(choice)]
        await roll_forward(ctx, Transcript(ctx), pieces, Lookahead(ctx.prompt, 3, 4), 1, [there, [], []])
    assert len(seeds) == len(set(seeds)) == 9 + 8 + 7 + 6


@pytest.mark.parametrize("name", STEPWISE)
async def test_candidates_of_a_step_have_log_probabilities_of_the_whole_answer(name: str) -> None:
    """Which is what the selection rule `likelihood` compares: of pieces of unequal length, the whole counts."""
    seen: list[tuple[tuple[int, ...], float]] = []

    class Likelihood(SELECTIONS["likelihood"]):  # type: ignore[misc]
        async def pick(self, pool: Any) -> Any:
            seen.extend(zip(pool.lengths, pool.logprobs, strict=True))
            return await super().pick(pool)

    engine = served()
    rule = Likelihood(beta=0.5, per="sum")
    ctx = tabular_context(engine, random_scores(), weights={"r": 1.0, "other": 0.0}, selection=rule,
                          sampling=SamplingSpec(9, seed=3))  # fmt: skip
    events = await run(EVERY[name](), ctx)
    answer = final(events).candidates[0]
    (exact,) = await engine.answer_logprobs([ctx.prompt], [answer.token_ids])
    assert any(length == len(answer.token_ids) and logprob == pytest.approx(sum(exact)) for length, logprob in seen)


async def test_a_value_is_the_mean_of_the_rollouts_combined_reward() -> None:
    """Not the combination of mean rewards, where that differs: the worst of two rewards, answer by answer."""
    rewards = {"r": {(1, 2): 0.0, (1, 3): 1.0}, "s": {(1, 2): 1.0, (1, 3): 0.0}}
    ctx = tabular_context(
        served(), Scores(rewards), weights={"r": 1.0, "s": 1.0}, combine=PointwiseMin(name="pointwise_min"),
        sampling=SamplingSpec(2, seed=1),
    )  # fmt: skip
    tails = [Piece("", [2], [], "length"), Piece("", [3], [], "length")]
    (candidate,) = (await value(ctx, Transcript(ctx), [Piece("", [1], [], "length")], [tails])).candidates
    assert candidate.rewards == {"r": 0.5, "s": 0.5}
    assert candidate.combined == 0.0
    weighed = await value(ctx, Transcript(ctx), [Piece("", [1], [], "length")], [tails], lambda group: [3.0, 1.0])
    assert weighed.candidates[0].rewards == {"r": 0.25, "s": 0.75}


async def test_rollouts_keep_the_least_length_of_the_answer() -> None:
    """A rollout that ended before min_tokens would value an answer that cannot be."""
    engine = TabularEngine({None: Endless(seed=1, end=0.9)})
    lengths = []

    class Spy(Scores):
        async def score(self, reward: str, group: Any, owner: int = 0) -> Any:
            lengths.extend(len(a.token_ids) for a in group.answers if not a.partial)
            return await super().score(reward, group, owner)

    guide = ControlledDecoding(ControlledDecoding.Params(k=3, block=2, rollouts=3))
    sampling = SamplingSpec(12, min_tokens=6, seed=1)
    end = final(
        await run(guide, tabular_context(engine, Spy({"r": Values(1)}, Values(2).__getitem__), sampling=sampling))
    )
    assert np.min(lengths) == 7
    assert len(end.candidates[0].token_ids) >= 7
