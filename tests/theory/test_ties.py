"""Ties, byes and greedy draws: what a selection does where candidates are, or are made, equal."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from contexts import context, final, run
from distributions import pool
from fakes import ScriptedEngine
from hypothesis import given
from hypothesis import strategies as st
from tabular import random_policy, random_reward
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.best_of_n import BestOfN
from guiderail.guides.controlled_decoding import ControlledDecoding
from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.types import Candidate, SamplingSpec
from guiderail.guides.scoring import RewardTerm, parse_chain
from guiderail.guides.scoring.combine import Sum
from guiderail.guides.scoring.scores import Combination
from guiderail.guides.scoring.scores import Scores as Table
from guiderail.guides.scoring.selection.best import SELECTIONS
from guiderail.guides.scoring.selection.tournament import Tournament
from guiderail.guides.scoring.selection_report import over_optimised
from guiderail.server.openai_errors import from_exception

CHAINS = ["calibrated", "exp", "neg_exp", "log", {"name": "clip", "high": 3}, "standardize", {"name": "log_sigmoid"}]


@pytest.mark.parametrize("weight", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("transform", CHAINS, ids=str)
async def test_a_transform_of_a_single_reward_never_changes_the_argmax(transform: object, weight: float) -> None:
    """It may make ties, as calibration on few answers does at the top; the raw value undoes them."""
    digits = lambda seed: [f"w{seed * 7919 % 10}", " end"]  # noqa: E731
    for seed in range(6):
        chain = parse_chain(transform).resolved(8)
        term = RewardTerm("last_digit", "last_digit", weight, None, chain)
        ctx = context(
            ScriptedEngine(digits), rewards=(term,), samples={"last_digit": [2.0, 3.0, 4.0]},
            sampling=SamplingSpec(9, seed=seed),
        )  # fmt: skip
        end = final(await run(BestOfN(BestOfN.Params(n=8)), ctx))
        raw = [np.sign(weight) * c.rewards["last_digit"] for c in end.candidates]
        assert end.chosen == raw.index(max(raw))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=9))
async def test_equal_scores_are_ordered_by_raw_value_then_by_place(pairs: list[tuple[int, int]]) -> None:
    scores, ties = [float(s) for s, _ in pairs], [float(t) for _, t in pairs]
    best = max(range(len(pairs)), key=lambda i: (scores[i], ties[i], -i))

    async def undecided(criterion: str, asked: Sequence[tuple[int, int]]) -> list[float]:
        return [0.5] * len(asked)

    async def alike(texts: Sequence[str]) -> np.ndarray:
        return np.tile([1.0, 0.0], (len(texts), 1))

    rules = [
        SELECTIONS["argmax"](),
        SELECTIONS["best_of_poisson"](),
        SELECTIONS["mbr"](),
        SELECTIONS["likelihood"](beta=1, per="sum"),
        Tournament(),
        Tournament(format="round_robin"),
    ]
    for rule in rules:
        made = pool(scores, ties=ties, logprobs=[-1.0] * len(pairs), embed=alike, prefer=undecided)
        assert (await rule.pick(made)).index == best


@pytest.mark.parametrize("n", [*range(1, 18), 31, 33])
async def test_a_coin_tossing_judge_gives_every_seat_one_chance_or_two(n: int) -> None:
    """Followed exactly: each comparison parts the chance in two. A bye in the first round, and never another."""
    bracket = 1 << (n - 1).bit_length()
    chance = dict.fromkeys(range(n), 0.0)
    passes: Counter[int] = Counter()
    everyone = set(range(n))

    async def follow(wanted: int) -> tuple[float, int]:
        """The chance of a candidate who wins whatever it is in, and the rounds it sat out."""
        played, rounds = 0, 0

        async def prefer(criterion: str, pairs: Sequence[tuple[int, int]]) -> list[float]:
            nonlocal played, rounds
            rounds += 1
            mine = [pair for pair in pairs if wanted in pair]
            played += len(mine)
            return [float(a == wanted) if wanted in (a, b) else 1.0 for a, b in pairs]

        choice = await Tournament().pick(pool(np.zeros(n), seed=3, prefer=prefer))
        assert choice.index == wanted
        assert choice.detail["comparisons"] == n - 1
        return 0.5**played, rounds - played

    for candidate in everyone:
        chance[candidate], passes[candidate] = await follow(candidate)
    assert sum(chance.values()) == pytest.approx(1)
    assert set(chance.values()) <= {1 / bracket, 2 / bracket}
    assert max(passes.values()) <= 1
    assert sum(passes.values()) == bracket - n


async def test_the_seed_deals_the_byes() -> None:
    passed: Counter[int] = Counter()
    for seed in range(400):
        seen: set[int] = set()

        async def prefer(criterion: str, pairs: Sequence[tuple[int, int]], seen: set[int] = seen) -> list[float]:
            if not seen:
                seen |= {i for pair in pairs for i in pair}
            return [1.0] * len(pairs)

        await Tournament().pick(pool(np.zeros(3), seed=seed, prefer=prefer))
        passed.update({0, 1, 2} - seen)
    assert sum(passed.values()) == 400
    assert all(abs(passed[i] - 400 / 3) < 4 * np.sqrt(400 * 2 / 9) for i in range(3))


def scored(scores: Sequence[float]) -> Table:
    plain = tuple(Candidate(i, "", (), "stop") for i in range(len(scores)))
    return Table(plain, {}, {}, Combination(Sum(), {}), np.array(scores, dtype=float))


@pytest.mark.parametrize(
    ("scores", "fires"),
    [
        (
            [0, 0, 0, 0, 0, 0, 0, 0.01, 0.02, 0.01, 0.03, 0.01, 0.02, 0.01, 0.02, 0.9],
            False,
        ),  # short answers: few values
        ([0.0] * 7 + [0.1, -0.1, 0.11, -0.12, 0.13, -0.14, 0.15, 0.9], False),
        ([1e-9 * i for i in range(12)] + [1.0], True),
        ([5 + 1e-9 * i for i in range(12)] + [6.0], False),  # equal up to rounding
        ([0.1 * i for i in range(10)] + [9.0], True),
        ([0.0] * 40 + [0.1 * i for i in range(12)] + [9.0], False),  # most are equal
    ],
)
def test_an_outlier_needs_a_spread_to_be_one(scores: list[float], fires: bool) -> None:
    at = int(np.argmax(scores))
    assert any("outlier" in w for w in over_optimised(scored(scores), at)) == fires


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_k": 1}])
async def test_draws_that_must_be_alike_are_told(greedy: dict[str, float]) -> None:
    policy = random_policy(1, horizon=4)
    for guide, more in (
        (BestOfN(BestOfN.Params(n=3)), True),
        (BestOfN(BestOfN.Params(n=1)), False),
        (ControlledDecoding(ControlledDecoding.Params(k=3, block=2)), True),
    ):
        for how, told in ((greedy, more), ({}, False)):
            ctx = tabular_context(
                TabularEngine.of(policy),
                Scores({"r": random_reward(policy, 2)}),
                sampling=SamplingSpec(4, **how, seed=1),
            )
            await run(guide, ctx)
            assert any("greedy" in w for w in ctx.report.warnings) == told


async def test_weights_beyond_numbers_are_the_clients_fault() -> None:
    term = RewardTerm("last_digit", "last_digit", 1e300, None, parse_chain("identity"))
    with pytest.raises(RequestError, match="1e100") as failure:
        await run(BestOfN(BestOfN.Params(n=3)), context(ScriptedEngine(), rewards=(term,)))
    assert str(from_exception(failure.value)).startswith("'alignment.combine': ")
