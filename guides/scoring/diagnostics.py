"""What a selection does, in figures: KL, effective sample size, entropy, warnings, gold reward.

Which of the KLs holds for a pool, and why, is in origin.py.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from guiderail.guides.core.types import Candidate, TokenLogprob
from guiderail.guides.scoring.transforms import Array, checked

if TYPE_CHECKING:
    from guiderail.guides.scoring.selection.rule import Choice

KL_LIMIT = 3.0  # nats; argmax over 54 candidates
OUTLIER_LIMIT = 6.0  # robust standard deviations above the median
MIN_POOL = 8  # candidates, below which medians and ranks say nothing
SAME = 1e-5  # relative difference of scores that are the same up to rounding
HIGH, LOW = 0.9, 0.1  # quantiles
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
    N u^(N - 1), of which N = n has all that the Poisson law gives to n and more. For mu far above n it is best-of-n.
    """
    reach = int(mu + 12 * math.sqrt(mu) + 40)  # beyond it the Poisson law has less than rounding
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


def effective_sample_size(weights: Array) -> float:
    """(sum w)^2 / sum w^2: how many equally weighted candidates the weights amount to, from 1 to their number."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def token_entropy(logprobs: Sequence[TokenLogprob] | None) -> dict[str, float | None]:
    """How sure the policy was, as means over the tokens that list their likeliest alternatives; None if none does.

    `token_entropy` (nats) is that of the distribution over these tokens and "any other", a lower bound of the whole
    one's; `top_mass` is the probability they hold together.
    """
    entropies, masses = [], []
    for token in logprobs or ():
        if not token.top:
            continue
        p = np.exp([logprob for _, logprob in token.top])
        mass = min(1.0, float(p.sum()))
        outcomes = np.append(p, 1.0 - mass)
        outcomes = outcomes[outcomes > 0]
        entropies.append(-float((outcomes * np.log(outcomes)).sum()))
        masses.append(mass)
    if not masses:
        return {"token_entropy": None, "top_mass": None}
    return {"token_entropy": math.fsum(entropies) / len(entropies), "top_mass": math.fsum(masses) / len(masses)}


def moved_far(kl: float | None) -> str | None:
    """The warning that an answer's selections together may have moved more than 3 nats from the policy, or None.

    Proxy and true reward part as KL grows (Gao et al., arXiv 2210.10760).
    """
    if kl is None or kl <= KL_LIMIT:
        return None
    return f"the selection moved up to {kl:.2f} nats from the base policy, more than {KL_LIMIT:g}"


def over_optimised(
    candidates: Sequence[Candidate], choice: "Choice", weights: Mapping[str, float] | None = None
) -> list[str]:
    """Signs that a selection went for a reward's errors rather than for what it measures; none is proof.

    - The chosen one's combined score is more than 6 robust standard deviations (1.4826 x the median absolute
      deviation) above the median: such scores are more often mistakes than gems. Only of at least 8 different scores,
      and each counted once: where many answers are equal, as short ones are, their scores are no measure of spread.
    - The chosen one is among the best tenth of at least 8 candidates under one reward and among the worst tenth
      under another. `weights` by label tell which rewards are to be small (negative) or ignored (0).
    """
    warnings: list[str] = []
    scores = [c.combined for c in candidates if c.combined is not None]
    if len(candidates) < MIN_POOL or len(scores) < len(candidates):
        return warnings
    z = _robust_z(np.array(scores), choice.index)
    if z > OUTLIER_LIMIT:
        warnings.append(f"the chosen score is an outlier, {z:.1f} robust standard deviations above the median")
    ranks = {}
    for label in candidates[choice.index].transformed:
        weight = 1.0 if weights is None else weights[label]
        if weight != 0:
            values = math.copysign(1.0, weight) * np.array([c.transformed[label] for c in candidates])
            own = values[choice.index]
            ranks[label] = float(((values < own).sum() + (values <= own).sum()) / (2 * len(values)))
    if ranks and max(ranks.values()) >= HIGH and min(ranks.values()) <= LOW:
        best, worst = max(ranks, key=ranks.__getitem__), min(ranks, key=ranks.__getitem__)
        warnings.append(f"rewards disagree: the chosen answer is among the best by '{best}', the worst by '{worst}'")
    return warnings


def _robust_z(scores: Array, index: int) -> float:
    """Of the score at `index` among the different scores; 0 where these are too few to measure a spread by.

    Scores that differ by rounding alone count as one: equal answers may have them.
    """
    different = np.unique(scores)
    rounding = SAME * float(np.median(np.abs(different)))
    different = different[np.append(True, np.diff(different) > rounding)]
    if len(different) < MIN_POOL or 2 * len(different) < len(scores):
        return 0.0
    median = np.median(different)
    return float(scores[index] - median) / (1.4826 * float(np.median(np.abs(different - median))))


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
