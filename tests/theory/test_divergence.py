"""f-divergence weights against numerical optimisers, and the properties that they share."""

import numpy as np
import pytest
from distributions import pool
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from scipy.special import softmax

from guiderail.guides.scoring.selection.best import SELECTIONS
from guiderail.guides.scoring.selection.divergence import f_divergence_weights

NAMES = ["reverse_kl", "forward_kl", "jensen_shannon", "total_variation"]


def divergence(name: str, w: np.ndarray) -> float:
    """D(w, uniform) from its definition on two distributions, not from a generator f."""
    u = np.full(len(w), 1 / len(w))

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        held = p > 0
        return float(p[held] @ np.log(p[held] / q[held]))

    with np.errstate(divide="ignore"):
        match name:
            case "reverse_kl":
                return kl(w, u)
            case "forward_kl":
                return kl(u, w)
            case "jensen_shannon":
                return (kl(w, (w + u) / 2) + kl(u, (w + u) / 2)) / 2
    return float(np.abs(w - u).sum() / 2)


def value(name: str, w: np.ndarray, scores: np.ndarray, beta: float) -> float:
    return float(w @ scores) - beta * divergence(name, w)


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("beta", [0.05, 0.3, 3.0])
def test_smooth_divergences_against_a_general_optimiser(name: str, beta: float) -> None:
    for seed in range(3):
        scores = np.random.default_rng(seed).normal(size=7)
        ours = f_divergence_weights(scores, name, beta)
        found = np.zeros(7)
        for _ in range(3):  # finite differences stop a run of BFGS early on some processors; a new one goes on
            best = minimize(lambda z, s=scores: -value(name, softmax(z), s, beta), found, method="BFGS", tol=1e-10)
            found = best.x
        assert value(name, ours, scores, beta) >= -best.fun - 1e-12
        assert value(name, ours, scores, beta) == pytest.approx(-best.fun, abs=1e-7)
        assert ours == pytest.approx(softmax(found), abs=1e-3)


@pytest.mark.parametrize("beta", [0.05, 0.5, 2.0])
def test_total_variation_against_a_linear_programme(beta: float) -> None:
    """Variables w, and d >= |w - 1/n|."""
    for seed in range(5):
        n, scores = 7, np.random.default_rng(seed).normal(size=7)
        cost = np.concatenate([-scores, np.full(n, beta / 2)])
        eye = np.eye(n)
        above = np.block([[eye, -eye], [-eye, -eye]])
        limits = np.concatenate([np.full(n, 1 / n), np.full(n, -1 / n)])
        found = linprog(cost, above, limits, [[1.0] * n + [0.0] * n], [1.0])
        ours = f_divergence_weights(scores, "total_variation", beta)
        assert value("total_variation", ours, scores, beta) == pytest.approx(-found.fun, abs=1e-9)
        assert ours == pytest.approx(found.x[:n], abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_no_nearby_distribution_is_better(name: str) -> None:
    rng = np.random.default_rng(4)
    scores = rng.normal(size=50)
    ours = f_divergence_weights(scores, name, 0.4)
    best = value(name, ours, scores, 0.4)
    for other in rng.dirichlet(np.ones(50), 200):
        for step in (1e-3, 0.1, 1.0):
            assert value(name, (1 - step) * ours + step * other, scores, 0.4) <= best + 1e-12


SCORE = st.one_of(st.floats(-3, 3), st.sampled_from([0.0, 1.0, 1e6, -1e6, 1e100, -1e100]))


@given(
    st.lists(SCORE, min_size=1, max_size=20),
    st.sampled_from(NAMES),
    st.sampled_from([5e-324, 1e-9, 0.1, 1.0, 1e6, 1e300]),
    st.randoms(use_true_random=False),
)
def test_weights_are_a_distribution_that_keeps_the_order(scores: list[float], name: str, beta: float, random) -> None:
    s = np.array(scores)
    w = f_divergence_weights(s, name, beta)
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1)
    assert (np.diff(w[np.argsort(s, kind="stable")]) >= -1e-15).all()
    for one in set(scores):
        assert np.ptp(w[s == one]) == 0, "equals weigh the same"
    order = list(range(len(s)))
    random.shuffle(order)
    assert f_divergence_weights(s[order], name, beta) == pytest.approx(w[order], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_beta_spans_from_the_maximum_to_a_plain_sample(name: str) -> None:
    scores = np.array([0.3, 1.0, 1.0, -2.0])
    assert f_divergence_weights(scores, name, 1e-9) == pytest.approx([0, 0.5, 0.5, 0], abs=1e-6)
    assert f_divergence_weights(scores, name, 1e9) == pytest.approx(np.full(4, 0.25), abs=1e-6)
    shifted = f_divergence_weights(1e3 * scores - 5e4, name, 200.0)
    assert shifted == pytest.approx(f_divergence_weights(scores, name, 0.2), rel=1e-9)


def test_golden_total_variation() -> None:
    """With beta 1: what is more than 1 below the best loses all to it, what is exactly 1 below stays."""
    w = f_divergence_weights(np.array([3.0, 2.5, 2.0, 1.9, 0.0]), "total_variation", 1.0)
    assert w == pytest.approx([0.6, 0.2, 0.2, 0, 0])


def test_forward_kl_keeps_a_chance_for_everyone() -> None:
    scores = np.array([0.0, 10.0, 1000.0])
    w = f_divergence_weights(scores, "forward_kl", 0.5)
    assert (w >= 0.5 / (3 * (0.5 + scores.max() - scores))).all()


@pytest.mark.parametrize("name", NAMES)
async def test_large_pools_tend_to_the_regularised_optimum(name: str) -> None:
    """Three kinds of answers: their shares of a large pool's weights maximise reward minus divergence from pi0."""
    base, rewards, beta = np.array([0.5, 0.3, 0.2]), np.array([0.0, 0.4, 1.0]), 0.7
    counts = np.round(base * 2000).astype(int)
    scores = np.repeat(rewards, counts)
    choice = await SELECTIONS["f_divergence"](divergence=name, beta=beta).pick(pool(scores))
    shares = np.array([choice.weights[scores == r].sum() for r in rewards])

    def objective(p: np.ndarray) -> float:  # the divergence of (shares, pi0) is that of the spread-out pool
        return value(name, np.repeat(p / counts, counts), scores, beta)

    for other in np.random.default_rng(0).dirichlet(np.ones(3), 300):
        assert objective(other) <= objective(shares) + 1e-12


@pytest.mark.parametrize("name", NAMES)
async def test_it_samples_by_its_weights(name: str) -> None:
    rule = SELECTIONS["f_divergence"](divergence=name, beta=0.5)
    scores = [0.0, 0.4, 1.0]
    picks = [(await rule.pick(pool(scores, seed=seed))).index for seed in range(3000)]
    weights = f_divergence_weights(np.array(scores), name, 0.5)
    assert np.abs(np.bincount(picks, minlength=3) / 3000 - weights).max() < 4 * 0.5 / np.sqrt(3000)
