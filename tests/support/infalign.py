"""InfAlign's table (arXiv 2412.19792) through the HTTP API: a tabular policy, a transform, and a KL to select at.

The policy writes four letters, each of 16 equally likely, so that an answer's quantile under its reward is known exactly;
the reward is a skewed function of it. A request draws a pool, calibrates on answers of its own, and selects by softmax at
`"kl"`. What it draws by stands in the response, as candidates' weights: the distribution of its answers is their mean.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from distributions import U, best_of, beta_for, tilted, win_rate, worst_of
from serving import serving
from tabular_engine import TabularEngine, TabularRenderer

from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.registry import load_guides
from guiderail.guides.core.reward import TextReward
from guiderail.guides.scoring import parse_chain
from guiderail.guides.scoring.kl import selection_kl
from guiderail.server.metrics import Metrics
from guiderail.server.runtime import assemble
from guiderail.server.settings import OperatorLimits, Settings
from guiderail.server.state import ServerState

LETTERS, LENGTH = 16, 4
SKEW = 5.0
N = 4  # of best-of-N and worst-of-N at inference
TRANSFORMS: dict[str, Any] = {
    "u": "calibrated",
    "log u": "log",
    "e^{5u}": {"name": "exp", "t": 5},
    "e^{10u}": {"name": "exp", "t": 10},
    "-e^{-5u}": {"name": "neg_exp", "t": 5},
    "-e^{-10u}": {"name": "neg_exp", "t": 10},
}


class Letters:
    """The next letter is any of the first 16; the answer does not end before its limit."""

    def distribution(self, prefix: Sequence[int]) -> np.ndarray:
        return np.append(0.0, np.full(LETTERS, 1 / LETTERS))


class Skewed(TextReward):
    """e^(5 u) of the answer's place u in the alphabet of answers, in (0, 1)."""

    def score_text(self, prompt: str, answer: str, params: Any) -> float:
        place = sum((ord(c) - ord("a")) * LETTERS ** (LENGTH - 1 - i) for i, c in enumerate(answer))
        return float(np.exp(SKEW * (place + 0.5) / LETTERS**LENGTH))


def state(candidates: int) -> ServerState:
    """A server over the policy, that allows so many candidates."""
    renderer: Any = TabularRenderer()
    engine: Any = TabularEngine({None: Letters()}, renderer=renderer, vocab_size=LETTERS + 1)
    settings = Settings(served_model_name="tabular", limits=OperatorLimits(max_candidates=candidates))
    rewards = {"skewed": Skewed()}
    services = Services(engine, renderer)
    return assemble(
        settings, engine, renderer, load_guides(["sampling", "best_of_n"]), rewards, services, Metrics("tabular")
    )


def exact(name: str, kl: float) -> np.ndarray:
    """(win rate, best of 4, worst of 4) of the policy that is best for this transform at this KL, by integration."""
    step = parse_chain(TRANSFORMS[name]).steps[-1]
    phi = U if step.name == "calibrated" else step.fit(np.zeros(10**8), {})(U)
    f = tilted(phi, beta_for(phi, kl))
    return np.array([win_rate(f), best_of(f, N), worst_of(f, N)])


@dataclass(frozen=True)
class Asked:
    """The answers of one cell: [R, C] quantiles and weights, [R] the KL reported, and chosen quantiles."""

    u: np.ndarray
    weights: np.ndarray
    kl: np.ndarray
    chosen: np.ndarray

    def win_rates(self, rows: np.ndarray | None = None) -> np.ndarray:
        """(one answer, best of 4, worst of 4) against as many of the policy, over the requests of `rows`."""
        rows = np.arange(len(self.u)) if rows is None else rows
        u, w = self.u[rows].ravel(), self.weights[rows].ravel() / len(rows)
        order = np.argsort(u, kind="stable")
        u, upto = u[order], np.minimum(1.0, np.cumsum(w[order]))
        below = np.append(0.0, upto[:-1])
        best = ((upto**N - below**N) * u**N).sum()
        worst = (((1 - below) ** N - (1 - upto) ** N) * (1 - (1 - u) ** N)).sum()
        return np.array([self.weights[rows].ravel() @ self.u[rows].ravel() / len(rows), best, worst])

    def standard_errors(self, resamples: int = 200) -> np.ndarray:
        """Of the win rates, by bootstrap over requests, each of which has a calibration sample of its own."""
        rng = np.random.default_rng(0)
        draws = rng.integers(len(self.u), size=(resamples, len(self.u)))
        return np.std([self.win_rates(rows) for rows in draws], axis=0, ddof=1)

    def distribution_kl(self, bins: int = 32) -> float:
        """KL in nats of the answers' mean distribution from the policy, over equal bins of the quantile."""
        mass = np.histogram(self.u.ravel(), bins, (0, 1), weights=self.weights.ravel())[0]
        return selection_kl(mass / mass.sum())


async def ask(url: str, transform: Any, kl: float, requests: int, candidates: int, calibration: int) -> Asked:
    """Asks for answers selected at this KL, each under a prompt of its own."""

    async def one(client: httpx.AsyncClient, i: int) -> dict[str, Any]:
        body = {
            "messages": [{"role": "system", "content": "abc"}, {"role": "user", "content": f"q{i}"}],
            "max_tokens": LENGTH,
            "seed": 1000 + i,
            "alignment": {
                "guide": {"name": "best_of_n", "n": candidates},
                "rewards": [{"name": "skewed", "transform": transform}],
                "select": {"name": "softmax", "kl": kl},
                "calibration": {"source": "drawn", "n": calibration},
                "return_candidates": True,
            },
        }
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["alignment"]["choices"][0]
        return choice

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        choices = [await one(client, i) for i in range(requests)]
    u = np.log([[c["rewards"]["skewed"] for c in choice["candidates"]] for choice in choices]) / SKEW
    return Asked(
        u,
        np.array([[c["weight"] for c in choice["candidates"]] for choice in choices]),
        np.array([choice["diagnostics"]["kl"] for choice in choices]),
        np.array([u[i, choice["chosen"]] for i, choice in enumerate(choices)]),
    )


async def table(
    cells: Sequence[tuple[str, float]], requests: int, candidates: int, calibration: int
) -> dict[tuple[str, float], Asked]:
    """Asks for each (transform, KL) of one server."""
    async with serving(state(candidates)) as url:
        return {cell: await ask(url, TRANSFORMS[cell[0]], cell[1], requests, candidates, calibration) for cell in cells}


def run_table(
    cells: Sequence[tuple[str, float]], requests: int, candidates: int, calibration: int
) -> dict[tuple[str, float], Asked]:
    """`table` outside of an event loop."""
    return asyncio.run(table(cells, requests, candidates, calibration))
