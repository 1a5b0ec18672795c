"""Gold reward of answers that are selected by a proxy reward, as selection grows harder."""

from collections.abc import Sequence

import numpy as np

from guiderail.guides.scoring.transforms import Array, checked


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
