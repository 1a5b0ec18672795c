"""What a selection does, in figures: KL from the base policy, effective sample size, entropy, warnings, gold reward.

KL. Whatever picks one of n independent candidates of the base policy, by whichever rule, the picked one lies in a
set of base probability a with probability at most 1 - (1 - a)^n: some candidate has to lie there. Best-of-n attains
this for the sets of its best answers, so its law majorises that of every other rule, and its
KL = log n - (n - 1) / n (continuous rewards; Beirami et al., arXiv 2401.01879) bounds theirs. A rule that draws by a
law w over the candidates has KL at most E[sum w log(n w)], by data processing; one pool's sum estimates that.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from guiderail.guides.pipeline.steps import Array, checked
from guiderail.guides.types import Candidate, TokenLogprob

if TYPE_CHECKING:
    from guiderail.guides.pipeline.rule import Choice

KL_LIMIT = 3.0  # nats; argmax over 54 candidates
OUTLIER_LIMIT = 6.0  # robust standard deviations above the median
MIN_POOL = 8  # candidates, below which medians and ranks say nothing
HIGH, LOW = 0.9, 0.1  # quantiles


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n nats: the KL of best-of-n under a continuous reward, a bound for every rule on n."""
    return math.log(n) - (n - 1) / n


def selection_kl(weights: Array) -> float:
    """sum w log(n w) nats for a law `weights` [n] over the candidates; its mean over pools bounds the draw's KL."""
    held = weights[weights > 0]
    return float((held * np.log(len(weights) * held)).sum())


def best_of_poisson_kl(mu: float) -> float:
    """KL in nats of best-of-(1 + Poisson(mu)): its law has the density (1 + mu u) e^(mu (u - 1)) in the quantile u."""
    nodes, node_weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(0.0, min(mu, 60.0), 17)  # s = mu (1 - u); beyond 60 nothing is left to e^-s
    half = np.diff(edges)[:, None] / 2
    s = edges[:-1, None] + half * (1 + nodes)
    log_density = np.log1p(mu - s) - s
    return float((half * node_weights * np.exp(log_density) * log_density).sum() / mu)


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


def over_optimised(
    candidates: Sequence[Candidate], choice: "Choice", weights: Mapping[str, float] | None = None
) -> list[str]:
    """Signs that a selection went for a reward's errors rather than for what it measures; none is proof.

    - The KL estimate exceeds 3 nats: proxy and true reward part as KL grows (Gao et al., arXiv 2210.10760).
    - Among at least 8 candidates the chosen one's combined score is more than 6 robust standard deviations
      (1.4826 x the median absolute deviation) above the median: such scores are more often mistakes than gems.
    - The chosen one is among the best tenth of at least 8 candidates under one reward and among the worst tenth
      under another. `weights` by label tell which rewards are to be small (negative) or ignored (0).
    """
    warnings = []
    if choice.kl > KL_LIMIT:
        warnings.append(f"the selection moved {choice.kl:.2f} nats from the base policy, more than {KL_LIMIT:g}")
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
    """0 where at least half of the scores are equal and there is no scale to measure by."""
    median = np.median(scores)
    scale = 1.4826 * float(np.median(np.abs(scores - median)))
    return float(scores[index] - median) / scale if scale > 0 else 0.0


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
