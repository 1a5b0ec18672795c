"""Inference-time pessimism (arXiv 2503.21878): its normaliser, its distribution, and what it refuses."""

import numpy as np
import pytest
from distributions import pool
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from guiderail.guides.scoring.selection.pessimism import Pessimism, threshold


@pytest.mark.parametrize(("beta", "lam"), [(0.5, 2.0), (1.0, 1.0), (2.0, -0.25), (5.0, -3.25)])
def test_golden_normalisers(beta: float, lam: float) -> None:
    assert 4 - threshold(np.array([0.0, 1.0, 2.0, 4.0]), beta) == pytest.approx(lam, abs=1e-12)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30), st.floats(1e-3, 1e3), st.sampled_from([1e-9, 1.0, 1e9]))
def test_the_normaliser_makes_a_distribution(rewards: list[float], beta: float, unit: float) -> None:
    r = np.array(rewards) * unit
    depth = threshold(r, beta * unit)
    assert depth > 0
    assert np.maximum(r - r.max() + depth, 0).mean() / (beta * unit) == pytest.approx(1, rel=1e-9)


def accept(scores: np.ndarray, depth: float, top: float, r_max: float) -> np.ndarray:
    return np.maximum(scores - top + depth, 0) / (depth + (r_max - top))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.sampled_from([1e-300, 0.05, 0.5, 1e6]))
async def test_the_distribution_is_that_of_the_first_accepted(scores: list[float], beta: float) -> None:
    """Against the loop of the algorithm, one candidate after the other."""
    r, half = np.array(scores), len(scores) // 2
    choice = await Pessimism(beta=beta, r_max=1.0).pick(pool(r))
    depth = threshold(r[:half], beta)
    distribution, left = np.zeros(len(r)), 1.0
    for i in range(half, len(r) - 1):
        p = accept(r[i : i + 1], depth, r[:half].max(), 1.0)[0]
        distribution[i] = left * p
        left *= 1 - p
    distribution[-1] = left
    assert choice.weights == pytest.approx(distribution, abs=1e-12)
    assert choice.weights[choice.index] > 0
    assert choice.detail["fallback"] == pytest.approx(left)
    assert choice.detail["lambda"] == pytest.approx(r[:half].max() - depth)
    assert choice.kl >= -1e-12


async def test_it_tends_to_the_chi_squared_regularised_optimum() -> None:
    """Over discrete answers with a large pool: frequencies of the selected against pi0 relu((r - lambda) / beta)."""
    base, rewards, beta = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.4, 0.8, 1.0]), 0.2
    lam = brentq(lambda x: base @ np.maximum(rewards - x, 0) / beta - 1, -5, 1)
    target = base * np.maximum(rewards - lam, 0) / beta
    assert target.sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    distribution, nats = np.zeros(4), []
    for seed in range(3000):
        answers = rng.choice(4, p=base, size=200)
        choice = await Pessimism(beta=beta, r_max=1.0).pick(pool(rewards[answers], seed=seed))
        np.add.at(distribution, answers, choice.weights / 3000)
        nats.append(choice.kl)
    assert distribution == pytest.approx(target, abs=0.03)
    held = target > 0
    exact = float((target[held] * np.log(target[held] / base[held])).sum())
    assert exact < np.mean(nats) < exact + 0.15, "a bound, and near"


async def test_beta_spans_from_the_maximum_to_a_plain_sample() -> None:
    scores = np.array([0.2, 0.9, 0.5, 0.1, 0.9, 0.3])
    cold = await Pessimism(beta=1e-12, r_max=0.9).pick(pool(scores))
    assert cold.weights == pytest.approx([0, 0, 0, 0, 1, 0], abs=1e-9)  # the first fresh one as good as the best
    hot = await Pessimism(beta=1e12, r_max=0.9).pick(pool(scores))
    assert hot.weights == pytest.approx([0, 0, 0, 1, 0, 0], abs=1e-9)  # the first fresh one, whatever it is


@pytest.mark.parametrize("scores", [[1.0] * 6, [0.0] * 6, [-1e6, 1.0, 0.0, -1e6, 1.0, 0.0], [1.0], [0.0, 1.0]])
@pytest.mark.parametrize("beta", [5e-324, 1.0, 1e100])
async def test_ties_and_extremes_stay_finite(scores: list[float], beta: float) -> None:
    choice = await Pessimism(beta=beta, r_max=1.0).pick(pool(scores))
    assert np.isfinite(choice.kl)
    if choice.weights is not None:
        assert choice.weights.sum() == pytest.approx(1)


async def test_what_it_cannot_work_with_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.2 exceeds r_max 1"):
        await Pessimism(r_max=1).pick(pool([0.0, 1.2]))
    with pytest.raises(ValueError, match="at least 3 candidates"):
        Pessimism(r_max=1).check(2)
    Pessimism(r_max=1).check(3)
    with pytest.raises(ValueError, match="r_max"):
        Pessimism()
