"""Exact distributions over a reward's quantile u in [0, 1], by integration, and pools of candidates to select from.

A policy that maximises E[phi(u)] - beta KL has the density f(u) ~ e^(phi(u) / beta). Integrals are sums over
Gauss-Legendre nodes on panels that get finer towards both ends.
"""

from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from scipy.optimize import brentq

from guiderail.guides.scoring.kl import Origin
from guiderail.guides.scoring.selection.best import Pool

ANSWERS = Origin("answers")

_X, _W = np.polynomial.legendre.leggauss(20)
_ENDS = np.geomspace(1e-5, 0.1, 16)
_EDGES = np.concatenate([[0], _ENDS, np.linspace(0.1, 0.9, 20)[1:-1], 1 - _ENDS[::-1], [1]])
_HALF = np.diff(_EDGES) / 2
U = (_EDGES[:-1, None] + _HALF[:, None] * (1 + _X)).ravel()
W = (_HALF[:, None] * _W).ravel()


def _integrals() -> np.ndarray:
    """[node, node]: integral from -1 to each node of the polynomial that is 1 at one node and 0 at the others."""
    basis = np.linalg.inv(np.polynomial.legendre.legvander(_X, len(_X) - 1))
    primitives = np.polynomial.legendre.legint(basis, lbnd=-1, axis=0)
    return np.polynomial.legendre.legval(_X, primitives).T


_INTEGRAL = _integrals()


def integral(f: np.ndarray) -> float:
    return float(W @ f)


def cdf(f: np.ndarray) -> np.ndarray:
    panels = f.reshape(len(_HALF), len(_X))
    whole = _HALF * (panels @ _W)
    before = np.concatenate([[0.0], np.cumsum(whole)[:-1]])
    return (before[:, None] + _HALF[:, None] * (panels @ _INTEGRAL.T)).ravel()


def tilted(phi: np.ndarray, beta: float) -> np.ndarray:
    f = np.exp((phi - phi.max()) / beta)
    return f / integral(f)


def kl(f: np.ndarray) -> float:
    return integral(f * np.log(np.maximum(f, 1e-300)))


def beta_for(phi: np.ndarray, target: float) -> float:
    """The beta at which the tilted distribution is `target` nats from the base policy."""
    spread = np.ptp(phi)
    return float(spread * np.exp(brentq(lambda b: kl(tilted(phi, spread * np.exp(b))) - target, -100, 10, xtol=1e-12)))


def win_rate(f: np.ndarray) -> float:
    return integral(f * U)


def best_of(f: np.ndarray, n: int) -> float:
    """Win rate of the best of n answers of f against the best of n of the base policy."""
    return integral(n * f * cdf(f) ** (n - 1) * U**n)


def worst_of(f: np.ndarray, n: int) -> float:
    return integral(n * f * np.clip(1 - cdf(f), 0, 1) ** (n - 1) * (1 - (1 - U) ** n))


async def no_embed(texts: Sequence[str]) -> np.ndarray:
    raise AssertionError("nothing was to be embedded")


async def no_judge(criterion: str, pairs: Sequence[tuple[int, int]]) -> list[float]:
    raise AssertionError("nothing was to be judged")


def pool(
    scores: Sequence[float] | np.ndarray,
    *,
    seed: int | None = 0,
    logprobs: Sequence[float | None] | None = None,
    lengths: Sequence[int] | None = None,
    ties: Sequence[float] | None = None,
    origin: Origin | None = ANSWERS,
    embed: Callable[[Sequence[str]], Awaitable[np.ndarray]] = no_embed,
    prefer: Callable[[str, Sequence[tuple[int, int]]], Awaitable[list[float]]] = no_judge,
) -> Pool:
    """A pool whose texts are the candidates' numbers."""
    n = len(scores)
    return Pool(
        scores=np.asarray(scores, dtype=np.float64),
        texts=[str(i) for i in range(n)],
        logprobs=[None] * n if logprobs is None else logprobs,
        lengths=[1] * n if lengths is None else lengths,
        seed=seed,
        embed=embed,
        prefer=prefer,
        ties=None if ties is None else np.array(ties),
        origin=origin,
    )
