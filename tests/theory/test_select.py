"""Selection rules: ties, permutations, seeds, extremes; and the ones with a reference of their own by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from distributions import pool
from hypothesis import given
from hypothesis import strategies as st

from guiderail.guides.scoring.kl import best_of_n_kl
from guiderail.guides.scoring.selection.best import SELECTIONS, Argmax, Pool
from guiderail.guides.scoring.selection.tournament import Tournament

SCORE = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([1e6, -1e6, 1e100, -1e100]))
SCORES = st.lists(SCORE, min_size=1, max_size=12)
RULES = [
    Argmax(),
    SELECTIONS["softmax"](beta=0.5),
    SELECTIONS["best_of_poisson"](mu=3),
    SELECTIONS["mbr"](beta=0.5),
    SELECTIONS["likelihood"](beta=0.1, per="sum"),
    SELECTIONS["pessimism"](r_max=1e100),
    SELECTIONS["f_divergence"](divergence="forward_kl"),
    Tournament(),
    Tournament(format="round_robin"),
]
BY_NAME = [pytest.param(rule, id=f"{rule.name}-{i}") for i, rule in enumerate(RULES)]


class World:
    """Candidates with embeddings, log-probabilities and a judge's taste that go with them when they are permuted."""

    def __init__(self, scores: Sequence[float], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.scores = np.array(scores)
        rows = rng.normal(size=(len(scores), 4))
        self.rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        self.logprobs = -rng.exponential(size=len(scores)) * 30
        self.lengths = rng.integers(1, 50, len(scores))
        self.taste = rng.permutation(len(scores))  # distinct: the judge never hesitates

    def pool(self, order: Sequence[int] | None = None, seed: int | None = 0) -> Pool:
        at = np.arange(len(self.scores)) if order is None else np.array(order)

        async def embed(texts: Sequence[str]) -> np.ndarray:
            assert list(texts) == [str(i) for i in range(len(at))]
            return self.rows[at]

        async def prefer(criterion: str, pairs: Sequence[tuple[int, int]]) -> list[float]:
            return [float(1 / (1 + np.exp(self.taste[at[b]] - self.taste[at[a]]))) for a, b in pairs]

        return pool(
            self.scores[at], seed=seed, logprobs=self.logprobs[at].tolist(), lengths=self.lengths[at].tolist(),
            embed=embed, prefer=prefer,
        )  # fmt: skip


def test_every_rule_is_covered() -> None:
    assert {rule.name for rule in RULES} == set(SELECTIONS)
    assert all(SELECTIONS[rule.name] is type(rule) for rule in RULES)


@pytest.mark.parametrize("rule", BY_NAME)
@given(scores=SCORES, seed=st.sampled_from([0, 1, -5, 2**64, None]))
async def test_every_choice_is_sound(rule: Any, scores: list[float], seed: int | None) -> None:
    world = World(scores)
    choice = await rule.pick(world.pool(seed=seed))
    assert 0 <= choice.index < len(scores)
    assert np.isfinite(choice.kl)
    assert choice.kl >= -1e-12
    assert choice.kl <= np.log(len(scores)) + 1e-9 or rule.name == "best_of_poisson"
    assert all(np.isfinite(v) for v in choice.detail.values())
    if choice.weights is not None:
        assert choice.weights.sum() == pytest.approx(1)
        assert choice.weights.min() >= 0
        assert choice.weights[choice.index] > 0
    if choice.scores is not None:
        assert np.isfinite(choice.scores).all()
    if seed is not None:
        assert (await rule.pick(world.pool(seed=seed))).index == choice.index
    assert rule.draws(8, seed) <= 8


@pytest.mark.parametrize("rule", [p for p in BY_NAME if p.values[0].name not in ("pessimism",)])
@given(scores=st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=9, unique=True), random=st.randoms())
async def test_permuting_the_candidates_permutes_the_result(rule: Any, scores: list[float], random) -> None:
    """The chosen candidate for rules without chance, the distribution for those that sample. (Pessimism takes in order.)"""
    world, order = World(scores), list(range(len(scores)))
    random.shuffle(order)
    plain, permuted = await rule.pick(world.pool()), await rule.pick(world.pool(order))
    if plain.weights is None:
        assert order[permuted.index] == plain.index
    else:
        assert permuted.weights == pytest.approx(plain.weights[order], rel=1e-9, abs=1e-12)
    assert permuted.kl == pytest.approx(plain.kl)


@given(scores=SCORES)
async def test_argmax_takes_the_first_of_equals(scores: list[float]) -> None:
    for rule in (Argmax(), SELECTIONS["best_of_poisson"]()):
        assert (await rule.pick(pool(scores))).index == scores.index(max(scores))
    assert (await Argmax().pick(pool(scores))).kl == best_of_n_kl(len(scores))


async def test_pessimism_ignores_the_order_of_its_first_half() -> None:
    rule, scores = SELECTIONS["pessimism"](r_max=1, beta=0.3), np.random.default_rng(0).random(9)
    one, other = await rule.pick(pool(scores)), await rule.pick(pool(scores[[3, 1, 0, 2, 4, 5, 6, 7, 8]]))
    assert one.weights == pytest.approx(other.weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_pool_must_be_finite_and_not_empty(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        pool([0.0, bad])
    with pytest.raises(ValueError, match="at least one candidate"):
        pool([])


async def test_sampling_without_a_seed_varies_and_follows_the_weights() -> None:
    rule = SELECTIONS["softmax"](beta=1.0)
    picks = [(await rule.pick(pool([0.0, 1.0, 2.0], seed=None))).index for _ in range(3000)]
    weights = (await rule.pick(pool([0.0, 1.0, 2.0]))).weights
    assert np.abs(np.bincount(picks, minlength=3) / 3000 - weights).max() < 4.5 * 0.5 / np.sqrt(3000)


async def test_mbr_by_hand() -> None:
    """Two alike and one apart, whose reward is a little higher."""
    rows = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])

    async def embed(texts: Sequence[str]) -> np.ndarray:
        return rows

    scores = np.array([0.0, 0.0, 0.2])
    choice = await SELECTIONS["mbr"](beta=1.0).pick(pool(scores, embed=embed))
    assert choice.scores == pytest.approx(scores + [1.8 / 3, 2.4 / 3, 1.6 / 3])
    assert choice.index == 1
    assert (await SELECTIONS["mbr"](beta=1e-6).pick(pool(scores, embed=embed))).index == 2

    async def long(texts: Sequence[str]) -> np.ndarray:
        return 2 * rows

    with pytest.raises(ValueError, match="unit vectors"):
        await SELECTIONS["mbr"]().pick(pool(scores, embed=long))


async def test_likelihood_by_hand_of_a_sum_and_of_a_mean() -> None:
    given_ = {"logprobs": [-10.0, -30.0, -9.0], "lengths": [10, 60, 0]}
    whole = await SELECTIONS["likelihood"](beta=0.1, per="sum").pick(pool([0.0, 1.0, 0.0], **given_))
    assert whole.scores == pytest.approx([-1.0, -2.0, -0.9])
    assert whole.index == 2
    mean = await SELECTIONS["likelihood"](beta=0.1, per="token").pick(pool([0.0, 1.0, 0.0], **given_))
    assert mean.scores == pytest.approx([-0.1, 0.95, -0.9])
    assert mean.index == 1
    with pytest.raises(ValueError, match="log-probability of every candidate"):
        await SELECTIONS["likelihood"](beta=1, per="sum").pick(pool([0.0, 1.0], logprobs=[-1.0, None]))


def judged(table: np.ndarray, asked: list[tuple[str, list[tuple[int, int]]]]) -> Any:
    async def prefer(criterion: str, pairs: Sequence[tuple[int, int]]) -> list[float]:
        asked.append((criterion, list(pairs)))
        return [float(table[a, b]) for a, b in pairs]

    return prefer


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
async def test_single_elimination_finds_a_consistent_judges_best_in_n_minus_1(n: int) -> None:
    taste = np.random.default_rng(n).permutation(n)
    table = (taste[:, None] > taste).astype(float)
    for seed in range(5):
        asked: list[Any] = []
        rule = Tournament(criterion="Which is kinder?")
        choice = await rule.pick(pool(np.zeros(n), seed=seed, prefer=judged(table, asked)))
        assert choice.index == taste.argmax()
        assert choice.detail == {"comparisons": n - 1}
        assert sum(len(pairs) for _, pairs in asked) == n - 1
        assert len(asked) == int(np.ceil(np.log2(n)))
        assert all(criterion == "Which is kinder?" for criterion, _ in asked)


async def test_round_robin_takes_the_largest_mean_win_probability() -> None:
    """Also where the judge goes in circles: 0 beats 1, 1 beats 2, 2 beats 0, by different margins."""
    table = np.array([[0.5, 0.9, 0.4], [0.1, 0.5, 0.8], [0.6, 0.2, 0.5]])
    asked: list[Any] = []
    choice = await Tournament(format="round_robin").pick(pool([0.0, 0.0, 9.0], prefer=judged(table, asked)))
    assert choice.scores == pytest.approx([0.65, 0.45, 0.4])
    assert choice.index == 0
    assert [pairs for _, pairs in asked] == [[(0, 1), (0, 2), (1, 2)]]


@pytest.mark.parametrize("format_", ["single_elimination", "round_robin"])
async def test_tournament_ties_go_to_the_larger_score_then_to_the_first(format_: str) -> None:
    undecided = np.full((4, 4), 0.5)
    for scores, winner in (([0.0, 1.0, 2.0, 1.0], 2), ([0.0, 1.0, 1.0, 0.0], 1), ([3.0] * 4, 0)):
        for seed in range(4):
            choice = await Tournament(format=format_).pick(pool(scores, seed=seed, prefer=judged(undecided, [])))
            assert choice.index == winner


async def test_a_tournament_refuses_nonsense() -> None:
    for table in (np.full((2, 2), 1.5), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="one probability a comparison"):
            await Tournament().pick(pool([0.0, 1.0], prefer=judged(table, [])))
    with pytest.raises(ValueError, match="at most 64 candidates"):
        Tournament(format="round_robin").check(65)
    Tournament().check(65)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("argmax", {"beta": 1}),
        ("softmax", {"beta": 0}),
        ("softmax", {"beta": float("nan")}),
        ("best_of_poisson", {"mu": 0}),
        ("best_of_poisson", {"mu": 1e9}),
        ("mbr", {"beta": -1}),
        ("likelihood", {"beta": 1}),
        ("likelihood", {"beta": 1, "per": "word"}),
        ("pessimism", {}),
        ("f_divergence", {}),
        ("f_divergence", {"divergence": "hellinger"}),
        ("tournament", {"format": "swiss"}),
        ("tournament", {"criterion": ""}),
    ],
)
def test_wrong_parameters_are_refused(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        SELECTIONS[name].model_validate(fields)
