"""Indirect Transfer Q*: a baseline aligned to another reward, corrected by self-normalised weights.

With rho ~ pi0 exp(r_BL / beta) the distribution rho exp((r - r_BL) / beta) is the policy aligned to r at the same beta, so the
weighted mean of rollouts tends to the Q of that policy, whatever r_BL is.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from contexts import run
from exact_distribution import distribution_of, led
from tabular import (
    Ids,
    aligned,
    answers_after,
    guided,
    q_values,
    random_policy,
    random_reward,
    total_variation,
)  # fmt: skip
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.core.types import SamplingSpec
from guiderail.guides.transfer_q import TransferQ

ALPHA, BETA = 0.2, 0.5
PI0 = random_policy(20, horizon=3, spread=0.7)
R = random_reward(PI0, 120)
R_BASELINE = random_reward(PI0, 9)
RHO = aligned(PI0, R_BASELINE, BETA)
TARGET = aligned(PI0, R, BETA)
WEIGHTS = {"r": 1.0, "r_baseline": 0.0}


def guide(**more: Any) -> TransferQ:
    values: dict[str, Any] = {
        "top_k": 4, "lookahead": None, "alpha": ALPHA, "rollouts": 64, "baseline": PolicySpec(model="adapter"),
        "baseline_reward": "r_baseline", "beta": BETA, "min_ess": 0.1,
    }  # fmt: skip
    return TransferQ(TransferQ.Params(**values | more))


def scores(r_baseline: Mapping[Ids, float] = R_BASELINE) -> Scores:
    return Scores({"r": R, "r_baseline": r_baseline})


def served() -> TabularEngine:
    return TabularEngine.of(PI0, adapters={"adapter": RHO})


async def test_it_corrects_a_baseline_aligned_to_another_reward() -> None:
    exact = guided(PI0, q_values(TARGET, R), ALPHA).answers()
    distribution = await distribution_of(guide(), served(), scores(), PI0, repeats=10, weights=WEIGHTS)
    assert total_variation(distribution, exact) < 0.025
    direct = await distribution_of(guide(baseline_reward=None), served(), scores(), PI0, repeats=2, weights=WEIGHTS)
    assert total_variation(direct, exact) > 0.12
    assert total_variation(direct, guided(PI0, q_values(RHO, R), ALPHA).answers()) < 0.06


def limit(s: Ids, z: int, exponent: Mapping[Ids, float], *, normalised: bool = True) -> float:
    """E_rho[w r] (/ E_rho[w]) with w = exp(exponent), exactly."""
    after = answers_after(RHO, (*s, z))
    w = {answer: p * np.exp(exponent[answer]) for answer, p in after.items()}
    return float(sum(w[a] * R[a] for a in w) / (sum(w.values()) if normalised else 1.0))


async def test_the_estimate_of_each_candidate_tends_to_the_value_of_the_aligned_policy() -> None:
    """And not to what a wrong sign, a missing normalisation or a missing correction would give."""
    seeds, runs = np.random.default_rng(1), 60
    found = np.zeros(4)
    for _ in range(runs):
        distribution, ctx = await led(
            guide(), served(), scores(), (0,), PI0.horizon, int(seeds.integers(2**62)), weights=WEIGHTS
        )
        found += (
            np.array([ALPHA * (np.log(distribution[0][z]) - np.log(PI0.distribution(())[z])) for z in range(4)]) / runs
        )
        assert 0 < ctx.report.detail["transfer_ess"] < 64
    found -= found[0]  # a distribution knows scores up to a constant
    right = {a: (R[a] - R_BASELINE[a]) / BETA for a in R}
    exact = q_values(TARGET, R)[()]
    assert exact == pytest.approx([R[(0,)], *(limit((), z, right) for z in (1, 2, 3))])
    assert found == pytest.approx(exact - exact[0], abs=0.02)
    wrong = {
        "sign": [limit((), z, {a: -v for a, v in right.items()}) for z in (1, 2, 3)],
        "no weights": [limit((), z, dict.fromkeys(R, 0.0)) for z in (1, 2, 3)],
        "no normalisation": [limit((), z, right, normalised=False) for z in (1, 2, 3)],
        "no baseline reward": [limit((), z, {a: R[a] / BETA for a in R}) for z in (1, 2, 3)],
        "beta upside down": [limit((), z, {a: v * BETA**2 for a, v in right.items()}) for z in (1, 2, 3)],
    }
    for mistake, values in wrong.items():
        assert np.abs(found[1:] - (np.array(values) - exact[0])).max() > 0.04, mistake


async def test_a_baseline_that_is_aligned_to_the_target_needs_no_correction() -> None:
    engine = TabularEngine.of(PI0, adapters={"adapter": TARGET})
    distribution, ctx = await led(guide(), engine, scores(R), (3, 2, 1), PI0.horizon, 5, weights=WEIGHTS)
    direct, _ = await led(guide(baseline_reward=None), engine, scores(R), (3, 2, 1), PI0.horizon, 5, weights=WEIGHTS)
    assert [list(step.values()) for step in distribution] == [pytest.approx(list(step.values())) for step in direct]
    assert ctx.report.detail["transfer_ess"] == pytest.approx(64)


async def test_weights_that_collapse_are_not_used_and_that_is_said() -> None:
    """At a beta far too small one rollout has all the weight: the answer's distribution is then that of direct transfer."""
    distribution, ctx = await led(
        guide(beta=0.003, min_ess=0.3), served(), scores(), (3, 2, 1), PI0.horizon, 5, weights=WEIGHTS
    )
    direct, plain = await led(
        guide(baseline_reward=None), served(), scores(), (3, 2, 1), PI0.horizon, 5, weights=WEIGHTS
    )
    assert distribution == direct
    assert ctx.report.detail["transfer_ess"] < 0.3 * 64
    assert any("collapsed" in warning for warning in ctx.report.warnings)
    assert not any("collapsed" in warning for warning in plain.report.warnings)
    trusting, _ = await led(
        guide(beta=0.003, min_ess=0.0), served(), scores(), (3, 2, 1), PI0.horizon, 5, weights=WEIGHTS
    )
    assert trusting != direct


async def test_the_effective_sample_size_is_that_of_the_weights() -> None:
    """Of two answers with weights 1 and e^-2, as drawn: (sum w)^2 / sum w^2, smallest over the candidates."""
    two = {(0,): 0.0, **{a: (1.0 if a[-1] else 0.0) for a in R if len(a) > 1}}
    _, ctx = await led(
        guide(beta=0.5, min_ess=0.0), served(), Scores({"r": two, "r_baseline": dict.fromkeys(R, 0.0)}), (0,),
        PI0.horizon, 3, weights=WEIGHTS,
    )  # fmt: skip
    sizes = []
    for ones in range(65):
        w = np.array([1.0] * ones + [np.exp(-2.0)] * (64 - ones))
        sizes.append(w.sum() ** 2 / (w**2).sum())
    assert min(abs(ctx.report.detail["transfer_ess"] - size) for size in sizes) < 1e-9


@pytest.mark.parametrize("weights", [{"r": 1.0}, {"r": 1.0, "r_baseline": 0.5}])
async def test_the_baseline_reward_must_be_one_that_is_only_reported(weights: dict[str, float]) -> None:
    ctx = tabular_context(served(), scores(), weights=weights, sampling=SamplingSpec(3, seed=1))
    with pytest.raises(RequestError, match="baseline_reward"):
        await run(guide(), ctx)


def test_one_rollout_has_nothing_to_be_weighed_against() -> None:
    services = Services(served(), served().renderer, frozenset({"adapter"}), "fake")
    with pytest.raises(ValueError, match="at least 2"):
        guide(rollouts=1).check(services)
    guide(rollouts=2).check(services)
