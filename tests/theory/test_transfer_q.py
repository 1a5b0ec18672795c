"""Transfer Q* against the exact optimal policy pi*(z | s) ~ pi0(z | s) exp(Q*(s, z) / alpha) of a tabular model."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from contexts import final, run
from exact_distribution import distribution_of, led
from tabular import (
    Tabular,
    aligned,
    best_q,
    ends,
    expected,
    greedy,
    guided,
    kl,
    q_values,
    random_policy,
    random_reward,
    total_variation,
)  # fmt: skip
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.core.types import SamplingSpec, Scored
from guiderail.guides.scoring.selection.best import Softmax
from guiderail.guides.transfer_q import TransferQ

ALPHA = 0.2
PI0 = random_policy(1)
R = random_reward(PI0, 2)
SHORT = random_policy(20, horizon=3, spread=0.7)
R_SHORT = random_reward(SHORT, 120)
RHO = aligned(SHORT, R_SHORT, 0.15)


def guide(**more: Any) -> TransferQ:
    """With the adapter as baseline, rolled out to the end."""
    values: dict[str, Any] = {"top_k": 4, "lookahead": None, "alpha": ALPHA, "baseline": PolicySpec(model="adapter")}
    return TransferQ(TransferQ.Params(**values | more))


def served(pi0: Tabular, rho: Tabular) -> TabularEngine:
    return TabularEngine.of(pi0, adapters={"adapter": rho})


async def test_an_optimal_baseline_gives_the_optimal_policy_exactly() -> None:
    """Of a baseline that always goes on for the best, one rollout is Q*, so nothing is left to chance."""
    q = best_q(PI0, R)
    distribution = await distribution_of(guide(), served(PI0, greedy(q, PI0)), Scores({"r": R}), PI0)
    exact = guided(PI0, q, ALPHA).answers()
    assert total_variation(distribution, exact) < 1e-9
    uniform = Tabular({s: np.full(4, 0.25) for s in PI0.table}, PI0.horizon)
    squared = Tabular({s: p**2 for s, p in PI0.table.items()}, PI0.horizon)
    mistakes = {
        "no prior": guided(uniform, q, ALPHA),
        "the prior twice": guided(squared, q, ALPHA),
        "a wrong sign": guided(PI0, {s: -v for s, v in q.items()}, ALPHA),
        "alpha upside down": guided(PI0, q, 1 / ALPHA),
        "the served policy rolled out": guided(PI0, q_values(PI0, R), ALPHA),
    }
    for mistake, policy in mistakes.items():
        assert total_variation(distribution, policy.answers()) > 0.1, mistake


async def test_the_argmax_takes_the_likeliest_token_of_the_optimal_policy() -> None:
    q = best_q(PI0, R)
    policy = guided(PI0, q, ALPHA)
    expected_ids: tuple[int, ...] = ()
    while not expected_ids or not ends(expected_ids, PI0.horizon):
        expected_ids = (*expected_ids, int(policy.distribution(expected_ids).argmax()))
    ctx = tabular_context(served(PI0, greedy(q, PI0)), Scores({"r": R}), sampling=SamplingSpec(5, seed=1))
    assert final(await run(guide(), ctx)).candidates[0].token_ids == expected_ids


async def test_softmax_with_beta_1_draws_answers_from_the_optimal_policy() -> None:
    q = best_q(PI0, R)
    engine, exact = served(PI0, greedy(q, PI0)), guided(PI0, q, ALPHA)
    n, seeds = 1200, np.random.default_rng(0)
    drawn = []
    for _ in range(n):
        sampling = SamplingSpec(5, seed=int(seeds.integers(2**62)))
        ctx = tabular_context(engine, Scores({"r": R}), sampling=sampling, selection=Softmax(beta=1.0))
        drawn.append(final(await run(guide(), ctx)).candidates[0].token_ids)
    first = Counter(answer[0] for answer in drawn)
    for z, p in enumerate(exact.distribution(())):
        assert abs(first[z] / n - p) < 4 * np.sqrt(p * (1 - p) / n)
    distribution = exact.answers()
    mean = expected(distribution, R)
    spread = np.sqrt(expected(distribution, {a: (v - mean) ** 2 for a, v in R.items()}))
    assert abs(np.mean([R[a] for a in drawn]) - mean) < 4 * spread / np.sqrt(n)
    assert mean - expected(PI0.answers(), R) > 20 * spread / np.sqrt(n)  # what an unguided model would show


@pytest.mark.parametrize("temperature", [0.5, 2.0])
async def test_the_temperature_is_that_of_the_softmax(temperature: float) -> None:
    """Weights of a step are those of softmax((log pi0 + Q / alpha) / (beta * temperature))."""
    q = best_q(PI0, R)
    sampling = SamplingSpec(5, temperature, seed=1)
    ctx = tabular_context(served(PI0, greedy(q, PI0)), Scores({"r": R}), sampling=sampling, selection=Softmax(beta=0.8))
    first = next(event for event in await run(guide(), ctx) if isinstance(event, Scored)).candidates
    tokens = [candidate.token_ids[0] for candidate in first]
    score = np.log(PI0.distribution(())[tokens]) + q[()][tokens] / ALPHA
    p = np.exp((score - score.max()) / (0.8 * temperature))
    assert [candidate.weight for candidate in first] == pytest.approx((p / p.sum()).tolist())


async def test_the_reported_kl_adds_up_to_that_of_the_policy() -> None:
    """Chain rule: its mean over answers is KL(pi* || pi0)."""
    q = best_q(SHORT, R_SHORT)
    engine, exact = served(SHORT, greedy(q, SHORT)), guided(SHORT, q, ALPHA).answers()
    mean = 0.0
    for answer, p in exact.items():
        _, ctx = await led(guide(), engine, Scores({"r": R_SHORT}), answer, SHORT.horizon, seed=1)
        mean += p * ctx.report.kl
    assert mean == pytest.approx(kl(exact, SHORT.answers()))


@pytest.mark.parametrize("reuse", [False, True])
async def test_a_stochastic_baseline_gives_the_policy_of_its_own_values(reuse: bool) -> None:
    """For rho aligned as RLHF or DPO would, which is not the optimal policy, it is pi0 exp(Q^rho / alpha)."""
    q = q_values(RHO, R_SHORT)
    exact = guided(SHORT, q, ALPHA).answers()
    distribution = await distribution_of(
        guide(rollouts=32, reuse=reuse), served(SHORT, RHO), Scores({"r": R_SHORT}), SHORT, repeats=12
    )
    assert total_variation(distribution, exact) < 0.02
    for other in (best_q(SHORT, R_SHORT), q_values(SHORT, R_SHORT)):
        assert total_variation(distribution, guided(SHORT, other, ALPHA).answers()) > 0.2


async def first_distributions(rollouts: int, runs: int, alpha: float) -> np.ndarray:
    """The distributions [runs, 4] of the first token over many seeds."""
    engine, seeds = served(SHORT, RHO), np.random.default_rng(rollouts)
    distributions = []
    for _ in range(runs):
        seed = int(seeds.integers(2**62))
        distribution, _ = await led(
            guide(rollouts=rollouts, alpha=alpha), engine, Scores({"r": R_SHORT}), (0,), SHORT.horizon, seed
        )
        distributions.append([distribution[0][z] for z in range(4)])
    return np.array(distributions)


async def test_the_error_falls_as_one_over_the_root_of_the_rollouts() -> None:
    """And its bias, which the exponential makes of the noise, as one over the rollouts."""
    alpha = 0.15
    exact = guided(SHORT, q_values(RHO, R_SHORT), alpha).distribution(())
    counts = np.array([1, 4, 16, 64])
    distributions = [
        await first_distributions(int(r), runs, alpha) for r, runs in zip(counts, (1500, 700, 300, 100), strict=True)
    ]
    errors = [np.sqrt(((distribution - exact) ** 2).sum(axis=1).mean()) for distribution in distributions]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)
    bias = [np.abs(distribution.mean(axis=0) - exact).sum() for distribution in distributions]
    assert bias[1] < 0.7 * bias[0]
    assert bias[2] < 0.25 * bias[0]
