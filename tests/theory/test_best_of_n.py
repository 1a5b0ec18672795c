"""Best-of-N and best-of-Poisson: their distributions, win rates and KLs; and what they bound for every other rule."""

import itertools
import math

import numpy as np
import pytest
from distributions import U, cdf, integral, kl, pool, win_rate
from scipy.special import expi
from scipy.stats import poisson

from guiderail.guides.scoring.kl import Origin, best_of_n_kl, best_of_poisson_kl, selection_kl
from guiderail.guides.scoring.selection.best import Argmax, BestOfPoisson, Softmax

BASE = np.array([0.5, 0.3, 0.15, 0.05])  # a base policy over four answers, in ascending order of reward


def discrete_kl(distribution: np.ndarray, base: np.ndarray = BASE) -> float:
    held = distribution > 0
    return float((distribution[held] * np.log(distribution[held] / base[held])).sum())


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_identities_of_a_continuous_reward(n: int) -> None:
    f = n * U ** (n - 1)
    assert win_rate(f) == pytest.approx(n / (n + 1), abs=1e-9)
    assert kl(f) == pytest.approx(best_of_n_kl(n), abs=1e-6)


def test_golden_values() -> None:
    assert [round(best_of_n_kl(n), 4) for n in (4, 16, 64)] == [0.6363, 1.8351, 3.1745]
    assert [round(n / (n + 1), 4) for n in (4, 16, 64)] == [0.8, 0.9412, 0.9846]


async def test_argmax_has_the_distribution_of_the_largest_quantile() -> None:
    rng = np.random.default_rng(0)
    n, rounds = 4, 4000
    u = rng.random((rounds, n))
    raw = np.exp(3 * u)  # any increasing reward
    chosen = np.array([u[i, (await Argmax().pick(pool(raw[i]))).index] for i in range(rounds)])
    assert chosen.mean() == pytest.approx(n / (n + 1), abs=4 * np.sqrt(n / (n + 1) ** 2 / (n + 2) / rounds))
    histogram, edges = np.histogram(chosen, bins=np.linspace(0, 1, 11))
    expected = np.diff(edges**n)
    assert np.abs(histogram / rounds - expected).max() < 4 * 0.5 / np.sqrt(rounds)


@pytest.mark.parametrize("n", [2, 4, 16])
async def test_a_discrete_reward_has_its_exact_distribution_at_less_kl(n: int) -> None:
    below = np.cumsum(BASE) - BASE
    distribution = (below + BASE) ** n - below**n
    assert distribution.sum() == pytest.approx(1)
    assert discrete_kl(distribution) < best_of_n_kl(n)
    rng = np.random.default_rng(n)
    answers = rng.choice(4, p=BASE, size=(3000, n))
    chosen = [row[(await Argmax().pick(pool(row))).index] for row in answers]
    assert np.abs(np.bincount(chosen, minlength=4) / 3000 - distribution).max() < 4 * 0.5 / np.sqrt(3000)


@pytest.mark.parametrize("n", [2, 3])
def test_no_rule_that_picks_one_of_n_exceeds_the_kl_of_best_of_n(n: int) -> None:
    """Random rules, which may look at all candidates and at their order, with their distributions summed up exactly."""
    rng = np.random.default_rng(n)
    pools = list(itertools.product(range(4), repeat=n))
    probabilities = np.array([BASE[list(p)].prod() for p in pools])
    worst = 0.0
    for _ in range(300):
        distribution = np.zeros(4)
        favourites = rng.permutation(4)
        for answers, probability in zip(pools, probabilities, strict=True):
            kind = rng.integers(3)
            if kind == 0:
                weights = rng.dirichlet(np.full(n, 0.1))
            else:  # by a preference of its own, for rare answers too
                ranks = favourites[list(answers)] if kind == 1 else -BASE[list(answers)]
                weights = np.eye(n)[int(np.argmax(ranks))]
            np.add.at(distribution, list(answers), probability * weights)
        worst = max(worst, discrete_kl(distribution))
    assert 0.3 * best_of_n_kl(n) < worst <= best_of_n_kl(n)


@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0, 10.0])
async def test_the_mean_of_the_kl_estimate_bounds_the_kl(beta: float) -> None:
    """Exactly, over all pools of 4 candidates."""
    distribution, estimate = np.zeros(4), 0.0
    for answers in itertools.product(range(4), repeat=4):
        probability = BASE[list(answers)].prod()
        choice = await Softmax(beta=beta).pick(pool(np.array(answers)))
        np.add.at(distribution, list(answers), probability * choice.weights)
        assert choice.kl == pytest.approx(selection_kl(choice.weights))
        estimate += probability * choice.kl
    assert discrete_kl(distribution) <= estimate
    assert discrete_kl(distribution) <= best_of_n_kl(4)


@pytest.mark.parametrize(("mu", "mean", "nats"), [(1, 0.6321, 0.1072), (4, 0.8114, 0.6739), (8, 0.8906, 1.2132)])
def test_best_of_poisson_golden_values(mu: float, mean: float, nats: float) -> None:
    f = (1 + mu * U) * np.exp(mu * (U - 1))
    assert integral(f) == pytest.approx(1)
    assert cdf(f) == pytest.approx(U * np.exp(mu * (U - 1)), abs=1e-12)
    counts = np.arange(200)  # a mixture of best-of-(1 + k)
    mixture = (poisson.pmf(counts, mu)[:, None] * (1 + counts[:, None]) * U ** counts[:, None]).sum(axis=0)
    assert f == pytest.approx(mixture)
    assert (round(integral(f * U), 4), round(kl(f), 4)) == (mean, nats)
    assert best_of_poisson_kl(mu) == pytest.approx(kl(f), abs=1e-8)


@pytest.mark.parametrize("mu", [1e-3, 0.3, 7.0, 60.0, 400.0, 4096.0])
def test_best_of_poisson_kl_has_its_closed_form(mu: float) -> None:
    """With v = 1 + mu u: integral of v e^v (log v + v) is (v - 1) e^v log v - e^v + Ei(v) + (v^2 - 2 v + 2) e^v."""
    top = 1 + mu

    def scaled(v: float) -> float:  # the primitive over e^top, which alone overflows
        ei = (
            expi(v) * math.exp(-top)
            if v < 600
            else sum(math.factorial(k) / v**k for k in range(20)) / v * math.exp(v - top)
        )
        return ((v - 1) * math.log(v) - 1 + v * v - 2 * v + 2) * math.exp(v - top) + ei

    exact = (scaled(top) - scaled(1.0)) / mu - (1 + mu)  # E[log v + mu u - mu], mu u = v - 1
    assert best_of_poisson_kl(mu) == pytest.approx(exact, rel=1e-8, abs=1e-9 * top)


async def test_best_of_poisson_draws_its_distribution() -> None:
    rule = BestOfPoisson(mu=4)
    rng = np.random.default_rng(3)
    counts = [rule.draws(10_000, seed) for seed in range(4000)]
    assert np.mean(counts) == pytest.approx(5, abs=4 * 2 / np.sqrt(4000))
    assert np.var(counts) == pytest.approx(4, rel=0.12)
    chosen = [(u := rng.random(count))[(await rule.pick(pool(u))).index] for count in counts]
    assert np.mean(chosen) == pytest.approx(0.8114, abs=4 * 0.2 / np.sqrt(4000))
    choice = await rule.pick(pool([0.0, 2.0, 2.0], origin=Origin("answers", 3, at_most=10_000)))
    assert (choice.index, choice.detail) == (1, {"n": 3.0})
    assert choice.kl == pytest.approx(0.6739, abs=5e-5)


def test_best_of_poisson_draws_at_most_n_and_the_same_for_a_seed() -> None:
    rule = BestOfPoisson(mu=50)
    assert rule.draws(8, 1) == 8
    assert BestOfPoisson(mu=1e-9).draws(8, 1) == 1
    for seed in (0, 7, -7, 2**70):
        assert rule.draws(1000, seed) == rule.draws(1000, seed)
    assert len({rule.draws(1000, None) for _ in range(20)}) > 1
    assert Argmax().draws(8, 1) == 8
