"""KL divergences from the policy, in nats, of what is chosen from a pool of candidates, by the pool's origin.

Two facts bound KL(the choice || policy):
- Independent draws. Whatever picks one of n independent draws, by whichever rule and at whatever time, the pick lies in
  a set of policy probability a with probability at most 1 - (1 - a)^n, as some draw has to lie there. Best-of-n attains
  this for the sets of its best answers, so its distribution majorises every other's and its KL = log n - (n - 1) / n
  (continuous rewards; Beirami et al., arXiv 2401.01879) bounds theirs. n counts the draws that were started: those
  that were rejected or cut off on the way were selected among as well. If the pick is drawn by weights w over the n,
  the KL is at most E[sum w log(n w)], by data processing against the uniform pick; a pool's own sum estimates that.
- Enumerated continuations z of known probability p(z). A draw by weights w has a KL of at most
  E[sum w log(w / p)], by convexity; for a choice without chance that is -log p of what was chosen. Beams are the same
  with p of all their tokens.
Bounds of successive picks add up (chain rule). So what a pick reports is the bound itself or, where a pool's weights or
a path through several steps come in, a value whose mean over requests is the bound. The policy of drawn candidates is
the one that the request samples from, its temperature, top_p, top_k and min_p included.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from guiderail.guides.scoring.transforms import Array

PoolKind = Literal["answers", "blocks", "tokens", "survivors", "beams"]
POOL_KINDS: dict[PoolKind, str] = {
    "answers": "independent whole answers",
    "blocks": "independent continuations",
    "tokens": "enumerated tokens",
    "survivors": "what a reward left of independent answers",
    "beams": "the whole answers that a beam search kept",
}
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)


@dataclass(frozen=True, slots=True)
class Origin:
    """Origin of the candidates of a pool.

    drawn: how many independent draws the candidates are what is left of, if there were more. at_most: the number that
    the selection rule chose the number of draws from (`Selection.draws`). log_prior: log-probabilities under the policy
    (temperature 1, nothing masked) of each candidate's step, for tokens; of its whole answer, for beams.
    """

    kind: PoolKind
    drawn: int = 0
    at_most: int | None = None
    log_prior: Sequence[float] | None = None

    def kl(self, weights: Array) -> float | None:
        """The bound of a draw by `weights` [C], in nats, or what its mean bounds; None if there is none."""
        n = max(self.drawn, len(weights))
        if self.log_prior is not None:
            held = weights > 0
            return float((weights[held] * (np.log(weights[held]) - np.asarray(self.log_prior)[held])).sum())
        if self.kind == "survivors":  # the weights are over what is left alone
            return best_of_n_kl(n)
        return selection_kl(weights, n) if self.kind in ("answers", "blocks") else None

    def kl_of(self, index: int, candidates: int) -> float | None:
        """The bound of taking candidate `index` of `candidates` without chance."""
        if self.log_prior is not None:
            return -self.log_prior[index]
        return best_of_n_kl(max(self.drawn, candidates)) if self.kind in ("answers", "blocks", "survivors") else None


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
