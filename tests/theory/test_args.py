"""ARGS against its formula, score(z) = log pi0(z | s) + w r(s, z), token by token."""

from typing import Any

import numpy as np
import pytest
from contexts import final, run
from exact_distribution import distribution_of
from tabular import Ids, ends, guided, random_policy, random_reward, total_variation
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.args import Args
from guiderail.guides.core.types import SamplingSpec, Scored
from guiderail.guides.scoring.selection.best import Argmax, Softmax

PI0 = random_policy(1)
R = random_reward(PI0, 2)


def partial(ids: Ids) -> float:
    return float(np.sin(1 + sum((t + 1) * z for t, z in enumerate(ids))))


def value(ids: Ids) -> float:
    return R[ids] if ends(ids, PI0.horizon) else partial(ids)


@pytest.mark.parametrize("w", [0.0, 1.5, 5.0])
async def test_greedy_takes_the_argmax(w: float) -> None:
    ids: Ids = ()
    while not ids or not ends(ids, PI0.horizon):
        ids = (*ids, max(range(4), key=lambda z: np.log(PI0.distribution(ids)[z]) + w * value((*ids, z))))
    ctx = tabular_context(TabularEngine.of(PI0), Scores({"r": R}, partial=partial), sampling=SamplingSpec(5, seed=1))
    answer = final(await run(Args(Args.Params(w=w)), ctx)).candidates[0]
    assert (answer.token_ids, answer.combined) == (ids, R[ids])


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.7])
async def test_the_temperature_is_that_of_the_softmax_and_leaves_the_argmax_alone(temperature: float) -> None:
    """Of ARGS-stochastic's tau: softmax(score / (beta * temperature)), which at 0 is ARGS-greedy."""
    scores, engine = Scores({"r": R}, partial=partial), TabularEngine.of(PI0)

    async def play(rule: Any, temperature: float) -> tuple[Ids, Any]:
        sampling = SamplingSpec(5, temperature, seed=1)
        end = final(
            await run(Args(Args.Params(w=1.5)), tabular_context(engine, scores, selection=rule, sampling=sampling))
        )
        return end.candidates[0].token_ids, end

    greedy, _ = await play(Argmax(), 1.0)
    assert (await play(Argmax(), temperature))[0] == greedy
    if temperature == 0:
        assert (await play(Softmax(beta=0.8), 0.0))[0] == greedy
        return
    sampling = SamplingSpec(5, temperature, seed=1)
    ctx = tabular_context(engine, scores, selection=Softmax(beta=0.8), sampling=sampling)
    first = next(e for e in await run(Args(Args.Params(w=1.5)), ctx) if isinstance(e, Scored)).candidates
    score = np.array([np.log(PI0.distribution(())[c.token_ids[0]]) + 1.5 * value(c.token_ids) for c in first])
    p = np.exp((score - score.max()) / (0.8 * temperature))
    assert [c.weight for c in first] == pytest.approx((p / p.sum()).tolist())


@pytest.mark.parametrize("tau", [1.0, 0.7])
async def test_stochastic_draws_the_softmax_of_scores_over_tau(tau: float) -> None:
    w = 1.5
    q = {s: np.array([value((*s, z)) for z in range(4)]) for s in PI0.table}
    prior = {s: p ** (1 / tau) / (p ** (1 / tau)).sum() for s, p in PI0.table.items()}
    exact = guided(type(PI0)(prior, PI0.horizon), q, tau / w).answers()
    distribution = await distribution_of(
        Args(Args.Params(w=w)), TabularEngine.of(PI0), Scores({"r": R}, partial=partial), PI0, beta=tau
    )
    assert total_variation(distribution, exact) < 1e-9
    assert total_variation(distribution, PI0.answers()) > 0.2
