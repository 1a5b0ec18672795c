"""Gold reward of answers that a proxy reward selects, as selection grows harder; and HedgeTune, which says how hard.

HedgeTune (Khalaf et al., arXiv 2506.19248) stops where the gold reward is largest. What a selection takes has a density
p_theta(u) in the proxy's quantile u under the base policy. The gold reward g(u) is largest where its derivative
E_p[g(u) d/dtheta log p_theta(u)] vanishes. Re-derived here:
                            distribution      density                      d/dtheta log density
  best_of_n        N        u^N               N u^(N - 1)                  1 / N + log u
  best_of_poisson  mu       u e^(mu (u - 1))  (1 + mu u) e^(mu (u - 1))    (u - 1) + u / (1 + mu u)
From M answers g is taken as constant on each ((i - 1) / M, i / M], so that every expectation is an exact sum over
differences of the distribution, and of its derivative in theta.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from guiderail.guides.scoring.transforms import Array, checked

Family = Literal["best_of_n", "best_of_poisson"]
GRID = 200
HALVINGS = 60


def by_proxy(proxy: Array, gold: Array) -> Array:
    """Gold rewards [M] ascending by proxy reward; equals in the proxy all get their mean, as if tied at random.

    Raises ValueError for values that are not finite, or not one gold a proxy reward, of which there must be one.
    """
    proxy, gold = checked(proxy), checked(gold)
    if proxy.ndim != 1 or proxy.shape != gold.shape or not proxy.size:
        raise ValueError(f"proxy {proxy.shape} and gold {gold.shape} must be one-dimensional, equally long, not empty")
    _, group, size = np.unique(proxy, return_inverse=True, return_counts=True)
    mean = np.bincount(group, weights=gold) / size
    return np.repeat(mean, size)


def best_of_n_curve(proxy: Array, gold: Array, ns: Sequence[int]) -> Array:
    """Gold reward of best-of-N by the proxy, for each N of `ns`, from rewards [M] of one prompt's answers.

    Of the C(M, N) sets of N answers, C(i - 1, N - 1) have the i-th smallest proxy as their largest: the sum over i of
    C(i - 1, N - 1) / C(M, N) gold_(i) is the mean over all sets, unbiased and of far less variance than drawing sets.
    Raises ValueError if an N is not between 1 and M.
    """
    ordered = by_proxy(proxy, gold)
    m = len(ordered)
    curve = np.zeros(len(ns))
    for at, n in enumerate(ns):
        if not 1 <= n <= m:
            raise ValueError(f"best-of-{n} cannot be estimated from {m} answers")
        # From the largest down: the first weight is N / M, and each next one (i - N) / (i - 1) of the one before.
        i = np.arange(m, n, -1)
        weights = np.concatenate([[1.0], np.cumprod((i - n) / (i - 1))]) * n / m
        curve[at] = float(weights @ ordered[::-1][: len(weights)])
    return curve


@dataclass(frozen=True, slots=True)
class Hedge:
    """The best `theta`, N (a real number) or mu, and its expected gold reward.

    `hacked` says whether more selection, up to the largest tried, would lower the gold reward.
    """

    theta: float
    gold: float
    hacked: bool


def distribution(family: Family, theta: float, u: Array) -> Array:
    """P(quantile of the selected answer <= u)."""
    out: Array = u**theta if family == "best_of_n" else u * np.exp(theta * (u - 1))
    return out


def score(family: Family, theta: float, u: Array) -> Array:
    """d/dtheta of the logarithm of the density at u > 0."""
    return 1 / theta + np.log(u) if family == "best_of_n" else (u - 1) + u / (1 + theta * u)


def hedge(proxy: Array, gold: Array, family: Family, largest: float = 1024.0) -> Hedge:
    """The theta of largest expected gold reward, from proxy and gold rewards [M] of answers to one prompt.

    Searched among N from 1 to `largest` candidates, or mu from 0 to `largest` - 1. To tune over several prompts,
    give proxy quantiles by prompt. Raises ValueError as `by_proxy` does, and unless `largest` > 1.
    """
    ordered = by_proxy(proxy, gold)
    if not largest > 1:
        raise ValueError(f"largest must exceed 1, not {largest}")
    u = np.arange(len(ordered) + 1) / len(ordered)
    thetas = np.geomspace(1.0, largest, GRID) - (family == "best_of_poisson")
    golds = [float(ordered @ np.diff(distribution(family, theta, u))) for theta in thetas]
    best = int(np.argmax(golds))
    if best == 0 or best == GRID - 1:
        return Hedge(float(thetas[best]), golds[best], hacked=best == 0)
    low, high = float(thetas[best - 1]), float(thetas[best + 1])
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(family, middle, u, ordered) > 0 else (low, middle)
    return Hedge(low, float(ordered @ np.diff(distribution(family, low, u))), hacked=True)


def _slope(family: Family, theta: float, u: Array, ordered: Array) -> float:
    """The derivative of the expected gold reward; d/dtheta of the distribution is 0 at both ends."""
    inner = u[1:-1]
    change = distribution(family, theta, inner) * (np.log(inner) if family == "best_of_n" else inner - 1)
    return float(ordered @ np.diff(change, prepend=0.0, append=0.0))
