"""Soft best-of-N tends to pi0 e^(r / beta) at the rate 1 / N (arXiv 2505.03156), by exact sums over all pools."""

import itertools

import numpy as np
import pytest
from distributions import pool
from scipy.stats import multinomial

from guiderail.guides.scoring.selection.best import Argmax, Softmax

BASE = np.array([0.6, 0.3, 0.1])
REWARDS = np.array([0.0, 1.0, 1.5])


def exact_distribution(n: int, beta: float) -> np.ndarray:
    """The distribution of the selected answer: over all counts of the three answers, their share of e^(r / beta)."""
    first, second = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    inside = first + second <= n
    counts = np.stack([first[inside], second[inside], n - first[inside] - second[inside]], axis=1)
    mass = counts * np.exp(REWARDS / beta)
    return multinomial.pmf(counts, n, BASE) @ (mass / mass.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_error_halves_as_n_doubles(beta: float) -> None:
    limit = BASE * np.exp(REWARDS / beta)
    limit /= limit.sum()
    errors = [np.abs(exact_distribution(n, beta) - limit).sum() / 2 for n in (32, 64, 128)]
    assert errors[0] < 0.1
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.25)
    nats = [float((distribution := exact_distribution(n, beta)) @ np.log(distribution / limit)) for n in (32, 64)]
    assert nats[0] / nats[1] > 1.8


async def test_the_rule_has_that_distribution() -> None:
    rng = np.random.default_rng(0)
    rounds, n, beta = 6000, 5, 0.7
    distribution = np.zeros(3)
    drawn = np.zeros(3)
    for seed in range(rounds):
        answers = rng.choice(3, p=BASE, size=n)
        choice = await Softmax(beta=beta).pick(pool(REWARDS[answers], seed=seed))
        np.add.at(distribution, answers, choice.weights / rounds)
        drawn[answers[choice.index]] += 1 / rounds
    exact = exact_distribution(n, beta)
    assert np.abs(distribution - exact).max() < 4 * 0.5 / np.sqrt(rounds)
    assert np.abs(drawn - exact).max() < 4 * 0.5 / np.sqrt(rounds)


@pytest.mark.parametrize("scores", [[0.0, 1e6, -1e6], [5.0, 5.0, 4.0], [-1e100, 1e100, 0.0]])
async def test_a_small_beta_is_argmax_and_a_large_one_a_plain_sample(scores: list[float]) -> None:
    cold = await Softmax(beta=1e-300).pick(pool(scores))
    best = np.array(scores) == max(scores)
    assert cold.weights == pytest.approx(best / best.sum())
    if best.sum() == 1:
        assert cold.index == (await Argmax().pick(pool(scores))).index
    hot = await Softmax(beta=1e300).pick(pool(scores))
    assert hot.weights == pytest.approx(np.full(3, 1 / 3))
    assert hot.kl == pytest.approx(0, abs=1e-12)
