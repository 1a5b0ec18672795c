"""Combinations: their order, their weights, and what they refuse. (MaxMin has a file of its own.)"""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guiderail.guides.scoring.chain import parse_chain
from guiderail.guides.scoring.combine import COMBINES, And, Combine, Constraints, PointwiseMin, Sum

LABELS = ("a", "b", "c")
VALUE = st.one_of(st.integers(-2, 2).map(float), st.sampled_from([1e6, -1e6, 1e100, -1e100, 0.5]))
TABLES = st.lists(st.tuples(VALUE, VALUE, VALUE), min_size=1, max_size=10).map(np.array)
RULES: list[Combine] = [
    Sum(), And(), PointwiseMin(), COMBINES["maxmin"](),
    Constraints(objective="a", floors={"b": 0.0, "c": -1.0}),
]  # fmt: skip
BY_NAME = [pytest.param(rule, id=rule.name) for rule in RULES]


def test_every_combination_is_covered() -> None:
    assert {rule.name for rule in RULES} == set(COMBINES)
    assert all(COMBINES[rule.name] is type(rule) for rule in RULES)


@pytest.mark.parametrize("rule", BY_NAME)
@given(TABLES, st.randoms(use_true_random=False))
def test_scores_are_finite_equal_for_equals_and_go_with_their_candidates(rule: Combine, values: Any, random) -> None:
    weights = np.array([1.0, 0.5, 2.0])
    scores = rule.combine(values, weights, LABELS)
    assert scores.shape == (len(values),)
    assert np.isfinite(scores).all()
    for i, j in itertools.combinations(range(len(values)), 2):
        if (values[i] == values[j]).all():
            assert scores[i] == scores[j]
    order = list(range(len(values)))
    random.shuffle(order)
    # maxmin's weights are solved for to a duality gap of about 1e-9, which is the square of what they may be off.
    off = 1e-4 if rule.name == "maxmin" else 1e-6
    rounding = off * max(1.0, np.abs(values).max())
    assert rule.combine(values[order], weights, LABELS) == pytest.approx(scores[order], rel=off, abs=rounding)
    if rule.pointwise:
        alone = [rule.combine(row[None], weights, LABELS)[0] for row in values]
        assert alone == scores.tolist()


@given(TABLES)
def test_constraints_order_as_stated(values: np.ndarray) -> None:
    """Feasible ones by objective, above all others; these by violation, then by objective; equals equal."""
    weights = np.array([3.0, 0.5, 2.0])
    scores = Constraints(objective="a", floors={"b": 0.0, "c": -1.0}).combine(values, weights, LABELS)

    def key(row: np.ndarray) -> tuple[float, float]:
        violation = 0.5 * max(0.0, 0.0 - row[1]) + 2.0 * max(0.0, -1.0 - row[2])
        return -violation, row[0]

    for (x, i), (y, j) in itertools.product(zip(values, scores, strict=True), repeat=2):
        assert (key(x) < key(y)) == (i < j)
    feasible = np.array([key(row)[0] == 0 for row in values])
    assert (scores[feasible] == values[feasible, 0]).all()
    if feasible.any() and not feasible.all():
        gap = scores[feasible].min() - scores[~feasible].max()
        assert gap >= np.ptp(scores[feasible])
        assert gap > 0


def test_a_floor_may_be_met_exactly() -> None:
    rule = Constraints(objective="a", floors={"b": 0.1})
    assert rule.combine(np.array([[5.0, 0.1], [9.0, 0.0999]]), np.ones(2), LABELS[:2]).argmax() == 0
    assert rule.combine(np.array([[5.0, 0.05], [9.0, 0.0]]), np.ones(2), LABELS[:2]).argmax() == 0, "least violation"
    assert rule.combine(np.array([[5.0, 0.0], [9.0, 0.0]]), np.ones(2), LABELS[:2]).argmax() == 1, "then objective"


def test_sums_and_minima_by_hand() -> None:
    values, weights = np.array([[1.0, 2.0], [0.5, -1.0]]), np.array([2.0, -0.5])
    assert Sum().combine(values, weights, "ab").tolist() == [1.0, 1.5]
    assert PointwiseMin().combine(values, np.array([4.0, 1.0]), "ab").tolist() == [2.0, -1.0]


@pytest.mark.parametrize("rule", BY_NAME)
def test_what_is_not_finite_or_does_not_fit_is_refused(rule: Combine) -> None:
    good = np.zeros((2, 3))
    for bad in (np.nan, np.inf, -np.inf):
        values, weights = good.copy(), np.ones(3)
        values[1, 2] = bad
        with pytest.raises(ValueError, match="finite"):
            rule.combine(values, weights, LABELS)
        weights[1] = bad
        with pytest.raises(ValueError, match="finite"):
            rule.combine(good, weights, LABELS)
    for values, weights in ((good, np.ones(2)), (good[:, :2], np.ones(3)), (good[0], np.ones(3))):
        with pytest.raises(ValueError, match="do not fit"):
            rule.combine(values, weights, LABELS)


@pytest.mark.parametrize(
    ("rule", "labels", "specs", "weights", "message"),
    [
        (And(), "ab", ["log_sigmoid", "calibrated"], (1, 1), "transform of 'b' must end in log_sigmoid"),
        (And(), "a", [None], (1,), "transform of 'a'"),
        (And(), "a", ["log_sigmoid"], (-1,), "at least 0; that of 'a' is -1"),
        (COMBINES["maxmin"](), "a", [None], (1,), "needs at least two"),
        (COMBINES["maxmin"](), "ab", [None, None], (1, 0), "positive weights; that of 'b' is 0"),
        (PointwiseMin(), "a", [None], (1,), "needs at least two"),
        (PointwiseMin(), "ab", [None, None], (-1, 1), "positive weights; that of 'a' is -1"),
        (Constraints(objective="x", floors={"a": 0}), "a", [None], (1,), "names 'x'"),
        (Constraints(objective="a", floors={"x": 0}), "ab", [None, None], (1, 1), "names 'x'"),
        (Constraints(objective="a", floors={"a": 0}), "a", [None], (1,), "floor on its own objective"),
        (Constraints(objective="a", floors={"b": 0}), "abc", [None] * 3, (1, 1, 1), "needs a floor for 'c'"),
        (Constraints(objective="a", floors={"b": 0}), "ab", [None] * 2, (1, 0), "positive weights; that of 'b'"),
    ],
    ids=str,
)
def test_rewards_that_do_not_go_together_are_refused(
    rule: Combine, labels: str, specs: list[Any], weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rule.check(list(labels), [parse_chain(spec) for spec in specs], weights)


def test_what_goes_together_passes() -> None:
    Sum().check(["a"], [parse_chain(None)], (-1.0,))
    And().check(["a", "b"], [parse_chain(["standardize", "log_sigmoid"]), And.default_chain], (1.0, 0.0))
    Constraints(objective="a", floors={"b": 0}).check(["b", "a"], [parse_chain(None)] * 2, (1.0, 1.0))
    assert And.default_chain.dump() == [{"name": "log_sigmoid", "reference": {"quantile": 0.85}, "temperature": 1.0}]
    assert all(rule.default_chain is None for rule in RULES if rule.name != "and")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("maxmin", {"beta": 0}),
        ("maxmin", {"beta": float("inf")}),
        ("constraints", {"objective": "a", "floors": {}}),
        ("constraints", {"objective": "a"}),
        ("constraints", {"objective": "a", "floors": {"b": float("nan")}}),
        ("sum", {"beta": 1}),
        ("and", {"name": "sum"}),
    ],
)
def test_wrong_parameters_are_refused(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        COMBINES[name].model_validate(fields)


FAR = [1.0, 1e9, 1e15, 1e60]


@pytest.mark.parametrize("floor", FAR)
@pytest.mark.parametrize("objective", [0.0, 1e9, -1e15])
def test_floors_that_nobody_keeps_order_by_violation_however_far_off_they_are(floor: float, objective: float) -> None:
    """To float64 all values in [0, 1] are equally far from 1e16."""
    rng = np.random.default_rng(0)
    held = rng.random(12) * 0.9
    goal = objective + rng.permutation(12)
    rule = COMBINES["constraints"](objective="goal", floors={"held": floor})
    scores = rule.combine(np.stack([goal, held], axis=1), np.ones(2), ["goal", "held"])
    assert np.argsort(-scores).tolist() == np.argsort(-held).tolist()


@pytest.mark.parametrize("size", [1e9, 1e15, 1e50])
def test_who_keeps_the_floors_is_above_who_does_not(size: float) -> None:
    goal = np.array([-size, size, size, 3 * size, 0.0])
    held = np.array([1.0, 0.5, -size, 0.4, 1.5])
    rule = COMBINES["constraints"](objective="goal", floors={"held": 1.0})
    scores = rule.combine(np.stack([goal, held], axis=1), np.ones(2), ["goal", "held"])
    assert np.argsort(-scores).tolist() == [4, 0, 1, 3, 2]


def test_several_far_floors_add_up_what_is_lacking() -> None:
    values = np.array([[0.0, 0.3, 0.3], [0.0, 0.5, 0.2], [0.0, 0.2, 0.3], [9.0, 0.1, 0.1]])
    rule = COMBINES["constraints"](objective="goal", floors={"a": 1e15, "b": 1e15})
    scores = rule.combine(values, np.array([1.0, 1.0, 2.0]), ["goal", "a", "b"])
    lacking = [-(a + 2 * b) for _, a, b in values]
    assert np.argsort(-scores, kind="stable").tolist() == np.argsort(lacking, kind="stable").tolist()


def test_raw_values_order_what_a_transform_made_equal() -> None:
    raw = np.array([[3.0], [7.0], [5.0], [5.0]])
    for weight in (0.01, 1.0, 1e300):
        assert COMBINES["sum"](name="sum").ties(raw, np.array([weight]), ["r"]).tolist() == [0, 2, 1, 1]
        assert COMBINES["sum"](name="sum").ties(raw, np.array([-weight]), ["r"]).tolist() == [0, -2, -1, -1]
    both = np.array([[1e9, 0.1], [2e9, 0.3], [3e9, 0.2]])  # several: ranks, as their units have nothing in common
    assert COMBINES["sum"](name="sum").ties(both, np.array([1.0, 1.0]), ["r", "s"]).tolist() == [0, 3, 3]
