"""Diagnostics of a selection, the unbiased best-of-N curve, and HedgeTune."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from distributions import U, integral
from hypothesis import given
from hypothesis import strategies as st

from guiderail.guides.core.types import Candidate, TokenLogprob
from guiderail.guides.scoring.combine import Sum
from guiderail.guides.scoring.hedge import best_of_n_curve, distribution, hedge, score
from guiderail.guides.scoring.kl import selection_kl
from guiderail.guides.scoring.scores import Combination, Scores
from guiderail.guides.scoring.selection_report import (
    SelectionReport,
    effective_sample_size,
    moved_far,
    over_optimised,
    token_entropy,
)


def test_effective_sample_size_and_kl_of_weights() -> None:
    for n in (1, 3, 50):
        assert effective_sample_size(np.full(n, 1 / n)) == pytest.approx(n)
        assert selection_kl(np.full(n, 1 / n)) == pytest.approx(0, abs=1e-12)
        assert effective_sample_size(np.eye(n)[0]) == pytest.approx(1)
        assert selection_kl(np.eye(n)[0]) == pytest.approx(math.log(n))
    assert effective_sample_size(np.array([0.5, 0.25, 0.25])) == pytest.approx(1 / (0.25 + 0.125))


def test_token_entropy_is_a_lower_bound_that_grows_with_k() -> None:
    p = np.sort(np.random.default_rng(0).dirichlet(np.ones(30)))[::-1]
    exact = -float(p @ np.log(p))

    def seen(k: int) -> dict[str, float | None]:
        top = tuple((i, math.log(p[i])) for i in range(k))
        return token_entropy([TokenLogprob(0, top[0][1], top), TokenLogprob(0, -1.0)])

    entropies = [seen(k)["token_entropy"] for k in (1, 2, 5, 20, 30)]
    assert entropies == sorted(entropies)
    assert entropies[0] == pytest.approx(-p[0] * math.log(p[0]) - (1 - p[0]) * math.log(1 - p[0]))
    assert entropies[-1] == pytest.approx(exact)
    assert seen(5)["top_mass"] == pytest.approx(p[:5].sum())
    both = [TokenLogprob(0, 0.0, ((0, 0.0),)), TokenLogprob(0, -0.7, ((0, math.log(0.5)), (1, math.log(0.5))))]
    assert token_entropy(both) == pytest.approx({"token_entropy": math.log(2) / 2, "top_mass": 1.0}, abs=1e-9)


def test_token_entropy_is_none_without_alternatives() -> None:
    for nothing in (None, [], [TokenLogprob(0, -1.0)]):
        assert token_entropy(nothing) == {"token_entropy": None, "top_mass": None}


def scores_of(*columns: np.ndarray, weights: Sequence[float] = ()) -> Scores:
    """Scores of candidates by their rewards r0, r1, ...; by their sum, unless there are weights."""
    rewards = {f"r{i}": column for i, column in enumerate(columns)}
    combination = Combination(Sum(), dict(zip(rewards, weights or [1.0] * len(columns), strict=True)))
    return Scores(tuple(Candidate(i, "", (), "stop") for i in range(len(columns[0]))), rewards, rewards, combination)


def test_warnings_say_what_is_odd() -> None:
    calm = np.linspace(0, 1, 10)
    assert over_optimised(scores_of(calm), 9) == []
    assert moved_far(3.0) is moved_far(None) is None
    assert "3.10 nats" in (moved_far(3.1) or "")
    (outlier,) = over_optimised(scores_of(np.append(calm, 9.0)), 10)
    assert "outlier" in outlier
    loved, hated = np.append(calm, 1.2), np.append(-calm / 10, -0.2)
    (split,) = over_optimised(scores_of(loved, hated), 10)
    assert "best by 'r0', the worst by 'r1'" in split
    assert over_optimised(scores_of(loved, hated, weights=[1.0, -1.0]), 10) == []
    assert over_optimised(scores_of(loved, hated, weights=[1.0, 0.0]), 10) == []


def test_many_small_steps_are_warned_of_as_one_long_way() -> None:
    """The warning goes by the sum over an answer's selections, and by nothing where one of them is not known."""
    report = SelectionReport()
    for step in range(20):
        assert report.warnings == [] if step <= 12 else report.warnings, f"after {step} steps"
        report.moved(0.24)
    (far,) = report.warnings
    assert "4.80 nats" in far
    report.moved(None)
    assert report.kl is None
    assert report.warnings == []


def test_warnings_keep_quiet_where_there_is_nothing_to_measure_by() -> None:
    few = np.array([0.0, 0.1, 0.2, 99.0])
    assert over_optimised(scores_of(few, -few), 3) == []
    assert over_optimised(scores_of(np.append(np.zeros(20), 1.0)), 20) == []  # most are equal


@pytest.mark.parametrize("n", [8, 16, 64])
def test_honest_pools_seldom_look_like_outliers(n: int) -> None:
    rng = np.random.default_rng(n)
    alarms = 0
    for _ in range(1000):
        scores = rng.normal(size=n)
        alarms += bool(over_optimised(scores_of(scores), int(scores.argmax())))
    assert alarms / 1000 < 0.05


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-5, 5)), min_size=1, max_size=6), st.integers(1, 6))
def test_the_curve_is_the_mean_over_all_subsets(pairs: list[tuple[int, float]], n: int) -> None:
    """Ties in the proxy count as if broken at random."""
    proxy, gold = np.array(pairs, dtype=float).T
    n = min(n, len(pairs))
    means = []
    for subset in itertools.combinations(range(len(pairs)), n):
        at = list(subset)
        means.append(gold[at][proxy[at] == proxy[at].max()].mean())
    assert best_of_n_curve(proxy, gold, [n])[0] == pytest.approx(np.mean(means), abs=1e-9)


def test_the_curve_is_stable_for_large_pools() -> None:
    """Where gold is rank / (M + 1) the mean is exactly N / (N + 1)."""
    m, ns = 1000, [1, 2, 10, 100, 500, 999, 1000]
    ranks = np.random.default_rng(0).permutation(m) + 1.0
    curve = best_of_n_curve(ranks, ranks / (m + 1), ns)
    assert curve == pytest.approx([n / (n + 1) for n in ns], rel=1e-12)
    assert best_of_n_curve(ranks, np.ones(m), ns) == pytest.approx(np.ones(len(ns)), rel=1e-12)


def test_the_curve_is_unbiased() -> None:
    """Over many small pools, against best-of-4 drawn afresh, with a gold reward that falls at the top."""
    rng = np.random.default_rng(1)
    u = rng.random((4000, 12))
    gold = u - 1.2 * u**8 + 0.1 * rng.normal(size=u.shape)
    estimates = [best_of_n_curve(a, b, [4])[0] for a, b in zip(u, gold, strict=True)]
    exact = 4 / 5 - 1.2 * 4 / 12
    assert np.mean(estimates) == pytest.approx(exact, abs=4 * np.std(estimates) / np.sqrt(4000))


def test_the_curve_refuses_what_it_cannot_estimate() -> None:
    with pytest.raises(ValueError, match="best-of-3 cannot be estimated from 2"):
        best_of_n_curve(np.zeros(2), np.zeros(2), [3])
    with pytest.raises(ValueError, match="equally long"):
        best_of_n_curve(np.zeros(2), np.zeros(3), [1])
    with pytest.raises(ValueError, match="finite"):
        best_of_n_curve(np.zeros(2), np.array([0.0, np.nan]), [1])


@pytest.mark.parametrize(("family", "theta"), [("best_of_n", 1.5), ("best_of_n", 9.0), ("best_of_poisson", 0.2), ("best_of_poisson", 8.0)])  # fmt: skip
def test_scores_are_the_derivatives_of_the_log_density(family: str, theta: float) -> None:
    step, density = 1e-5, {}
    for at in (theta - step, theta, theta + step):
        density[at] = at * U ** (at - 1) if family == "best_of_n" else (1 + at * U) * np.exp(at * (U - 1))
    numeric = (np.log(density[theta + step]) - np.log(density[theta - step])) / (2 * step)
    assert score(family, theta, U) == pytest.approx(numeric, rel=1e-5, abs=1e-5)
    assert integral(density[theta] * score(family, theta, U)) == pytest.approx(0, abs=1e-6)
    primitive = np.gradient(distribution(family, theta, np.linspace(0, 1, 10_001)), 1e-4)
    at = np.linspace(0, 1, 10_001)[100:-1]
    exact = theta * at ** (theta - 1) if family == "best_of_n" else (1 + theta * at) * np.exp(theta * (at - 1))
    assert primitive[100:-1] == pytest.approx(exact, rel=1e-3)


def test_hedge_finds_the_exact_optimum() -> None:
    """Gold u - a u^8: its best-of-N mean N/(N+1) - a N/(N+8) is largest where (N+8)/(N+1) = sqrt(8 a)."""
    u = (np.arange(4000) + 0.5) / 4000
    for a, best in ((0.5, 6.0), (0.25, (8 - math.sqrt(2)) / (math.sqrt(2) - 1))):
        found = hedge(u, u - a * u**8, "best_of_n")
        assert found.hacked
        assert found.theta == pytest.approx(best, rel=2e-3)
        assert found.gold == pytest.approx(best / (best + 1) - a * best / (best + 8), abs=1e-5)
    found = hedge(u, u - 0.5 * u**8, "best_of_poisson")
    gold = U - 0.5 * U**8
    density = (1 + found.theta * U) * np.exp(found.theta * (U - 1))
    assert integral(gold * density * score("best_of_poisson", found.theta, U)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", ["best_of_n", "best_of_poisson"])
def test_hedge_says_when_there_is_no_turning_point(family: str) -> None:
    u = np.random.default_rng(0).random(500)
    first = 1.0 if family == "best_of_n" else 0.0
    honest = hedge(u, u, family, largest=64)
    assert (honest.theta, honest.hacked) == (pytest.approx(63 + first), False)
    opposed = hedge(u, -u, family, largest=64)
    assert (opposed.theta, opposed.hacked) == (first, True)
    assert opposed.gold == pytest.approx(-u.mean())
    with pytest.raises(ValueError, match="exceed 1"):
        hedge(u, u, family, largest=1)


def test_hedge_on_noisy_data_is_near_the_optimum() -> None:
    rng = np.random.default_rng(2)
    u = rng.random(20_000)
    gold = u - 0.5 * u**8 + 0.2 * rng.normal(size=u.size)
    found = hedge(np.exp(u), gold, "best_of_n")
    best = 6 / 7 - 0.5 * 6 / 14
    assert found.theta / (found.theta + 1) - 0.5 * found.theta / (found.theta + 8) == pytest.approx(best, abs=0.005)
