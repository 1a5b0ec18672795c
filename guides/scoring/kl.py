"""KL divergences, in nats, between what a selection chooses from draws of a policy and the policy.

Which of them holds for a pool, and why, is in origin.py.
"""

import math
from functools import lru_cache

import numpy as np

from guiderail.guides.scoring.transforms import Array

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n nats: the KL of best-of-n under a continuous reward, a bound for every rule on n draws."""
    return math.log(n) - (n - 1) / n


def selection_kl(weights: Array, n: int | None = None) -> float:
    """sum w log(n w) nats for weights over n draws (default: as many as weights); its mean bounds the draw's KL."""
    held = weights[weights > 0]
    return float((held * np.log((len(weights) if n is None else n) * held)).sum())


@lru_cache(maxsize=256)
def best_of_poisson_kl(mu: float, n: int | None = None) -> float:
    """KL in nats of best-of-min(n, 1 + Poisson(mu)), n None being no cap.

    Without a cap its density is (1 + mu u) e^(mu (u - 1)) in the quantile u. With one it is a mixture of the densities
    N u^(N - 1), of which N = n has all that the Poisson distribution gives to n and more. For mu far above n it is
    best-of-n.
    """
    reach = int(mu + 12 * math.sqrt(mu) + 40)  # beyond it the Poisson distribution has less than rounding
    if n is not None and n < reach:
        return _capped_poisson_kl(mu, n)
    edges = np.linspace(0.0, min(mu, 60.0), 17)  # s = mu (1 - u); beyond 60 nothing is left to e^-s
    half = np.diff(edges)[:, None] / 2
    s = edges[:-1, None] + half * (1 + _NODES)
    log_density = np.log1p(mu - s) - s
    return float((half * _WEIGHTS * np.exp(log_density) * log_density).sum() / mu)


def _capped_poisson_kl(mu: float, n: int) -> float:
    counts = np.arange(n)  # beyond the first
    p = np.exp(counts * math.log(mu) - mu - np.array([math.lgamma(k + 1) for k in range(n)]))
    p[-1] = max(0.0, 1.0 - float(p[:-1].sum()))
    edges = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 48)])  # of 1 - u
    half = np.diff(edges)[:, None] / 2
    v = edges[:-1, None] + half * (1 + _NODES)
    density = ((p * (counts + 1)) @ np.exp(counts[:, None] * np.log1p(-v.ravel()))).reshape(v.shape)
    held = density > 0
    return float((half * _WEIGHTS * density * np.log(density, where=held, out=np.zeros_like(density))).sum())
