"""MaxMin-RLHF over candidates (arXiv 2402.08925): the dual's solution against brute force, and what it means."""

import numpy as np
import pytest
from distributions import pool
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from guiderail.guides.scoring.combine import MaxMin, PointwiseMin
from guiderail.guides.scoring.maxmin import maxmin_dual
from guiderail.guides.scoring.selection.best import Softmax


def g(values: np.ndarray, w: np.ndarray, beta: float) -> float:
    """beta log mean_c exp((r w)_c / beta); w may be [..., U]."""
    return beta * (logsumexp(np.moveaxis(values @ w.T, 0, -1) / beta, axis=-1) - np.log(len(values)))


def primal(values: np.ndarray, q: np.ndarray, beta: float) -> float:
    held = q > 0
    return float((q @ values).min() - beta * (q[held] @ np.log(len(q) * q[held])))


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_two_groups_against_a_grid(beta: float, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(24, 2))
    w, gap = maxmin_dual(values, beta)
    grid = np.linspace(0, 1, 20_001)
    every = g(values, np.stack([grid, 1 - grid], axis=1), beta)
    assert w.sum() == pytest.approx(1)
    assert 0 <= gap <= 1e-8
    assert every.min() >= g(values, w, beta) - gap - 1e-14 * max(1, beta)
    assert w[0] == pytest.approx(grid[every.argmin()], abs=1e-4)


@pytest.mark.parametrize("groups", [3, 5])
@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_several_groups_against_a_general_optimiser(groups: int, beta: float) -> None:
    for seed in range(5):
        values = np.random.default_rng(seed).random((40, groups))
        w, gap = maxmin_dual(values, beta)
        best = min(
            minimize(
                lambda z, v=values: float(g(v, softmax(z), beta)), start, method="Nelder-Mead" if groups < 4 else "BFGS",
                options={"maxiter": 4000},
            ).fun
            for start in np.random.default_rng(9).normal(size=(2, groups))
        )  # fmt: skip
        assert g(values, w, beta) <= best + 1e-9
        assert g(values, w, beta) == pytest.approx(best, abs=1e-4)
        assert gap <= 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_policy_maximises_the_worst_expected_reward_minus_kl(seed: int) -> None:
    """Strong duality: the answer's distribution attains the dual's value in the primal, and no other distribution exceeds it."""
    rng = np.random.default_rng(seed)
    values, beta = rng.random((8, 3)), 0.2
    w, gap = maxmin_dual(values, beta)
    q = softmax(values @ w / beta)
    assert primal(values, q, beta) == pytest.approx(g(values, w, beta), abs=1e-8)
    for other in np.concatenate([rng.dirichlet(np.ones(8), 2000), 0.9 * q + 0.1 * rng.dirichlet(np.ones(8), 2000)]):
        assert primal(values, other, beta) <= primal(values, q, beta) + gap + 1e-12


@given(
    st.integers(1, 12),
    st.integers(2, 5),
    st.integers(0, 2**32 - 1),
    st.floats(-4, 9),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.booleans(),
)
def test_the_gap_certifies_every_problem(c: int, u: int, seed: int, exponent: float, unit: float, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(c, u)) * unit
    if ties:
        values = np.round(values / unit) * unit
        values[:, -1] = values[:, 0]
    spread = max(np.ptp(values), 1e-12 * unit)
    beta = 10**exponent * spread
    w, gap = maxmin_dual(values, beta)
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1)
    assert -1e-12 * spread <= gap <= max(1e-5 * min(beta, spread), 0)


def test_the_unit_does_not_matter_and_the_order_of_candidates_does_not() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(30, 3))
    w, _ = maxmin_dual(values, 0.3)
    for scale, shift in ((1e-9, 0.0), (1e9, 7e9), (1.0, -50.0)):
        assert maxmin_dual(scale * values + shift, 0.3 * scale)[0] == pytest.approx(w, abs=1e-6)
    order = rng.permutation(30)
    assert maxmin_dual(values[order], 0.3)[0] == pytest.approx(w, abs=1e-8)
    rule, weights, labels = MaxMin(beta=0.3), np.ones(3), "abc"
    assert rule.combine(values[order], weights, labels) == pytest.approx(
        rule.combine(values, weights, labels)[order], abs=1e-7
    )


async def test_the_minority_is_served_where_a_sum_forgets_it() -> None:
    """Ten answers please group a a little more than the one that pleases both: the sum of a 10:1 mixture picks a's."""
    values = np.array([[1.0, 0.0]] * 10 + [[0.8, 0.8]])
    mixture = values @ np.array([10 / 11, 1 / 11])
    assert mixture.argmax() < 10
    rule = MaxMin(beta=0.05)
    scores = rule.combine(values, np.ones(2), "ab")
    assert scores.argmax() == 10
    choice = await Softmax(beta=0.05).pick(pool(scores))
    expected = choice.weights @ values
    assert expected.min() > 0.75
    w, _ = rule.dual(values, np.ones(2))
    assert w[1] > w[0]


async def test_the_minimum_of_expectations_is_no_stricter_than_the_expected_minimum() -> None:
    """Answers that please either group: mixing them serves both in expectation, though none does by itself."""
    values = np.array([[1.0, 0.0], [0.0, 1.0], [0.35, 0.35]])
    maxmin = MaxMin(beta=0.01).combine(values, np.ones(2), "ab")
    assert maxmin == pytest.approx([0.5, 0.5, 0.35], abs=1e-6)
    assert PointwiseMin().combine(values, np.ones(2), "ab").argmax() == 2
    q = (await Softmax(beta=0.01).pick(pool(maxmin))).weights
    assert (q @ values).min() > q @ values.min(axis=1)


def test_a_group_that_is_never_worst_has_no_say() -> None:
    values = np.random.default_rng(0).random((20, 2)) + np.array([5.0, 0.0])
    w, _ = maxmin_dual(values, 0.1)
    assert w == pytest.approx([0, 1], abs=1e-8)


def test_a_weight_changes_the_unit() -> None:
    values = np.random.default_rng(0).random((20, 2)) * np.array([1.0, 0.1])
    same_unit = values * np.array([1.0, 10.0])
    w, _ = maxmin_dual(same_unit, 0.1)
    assert w.min() > 0.1, "both rewards bind"
    assert MaxMin().combine(values, np.array([1.0, 10.0]), "ab") == pytest.approx(same_unit @ w)


@pytest.mark.parametrize("values", [[[1e6, -1e6], [-1e6, 1e6]], [[1.0, 1.0]], [[-1e100, 1e100]], [[2.0, 2.0]] * 3])
def test_extremes_stay_finite(values: list[list[float]]) -> None:
    for beta in (5e-324, 0.1, 1e100):
        assert np.isfinite(MaxMin(beta=beta).combine(np.array(values), np.ones(2), "ab")).all()
