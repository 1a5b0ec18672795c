"""Logit mixing and contrastive decoding's mask against the exact distribution of a small tabular policy."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from contexts import final, run
from every_guide import Values
from tabular import Ids, ends, random_policy
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.core.types import SamplingSpec
from guiderail.guides.logit_mix import LogitMix

PI0 = random_policy(1, horizon=3, spread=1.5)
OTHER = random_policy(2, horizon=3, spread=1.5)
N = 700


def exact(weight: float, share: float, temperature: float) -> dict[Ids, float]:
    """Each answer's probability: pi_0 * pi_1^w over the plausible tokens, to the power 1 / T."""
    found: dict[Ids, float] = {}

    def walk(prefix: Ids, p: float) -> None:
        own = PI0.distribution(prefix)
        mixed = np.where(own >= share * own.max(), own * OTHER.distribution(prefix) ** weight, 0) ** (1 / temperature)
        for z, q in enumerate(mixed / mixed.sum()):
            if q and ends((*prefix, z), PI0.horizon):
                found[(*prefix, z)] = p * q
            elif q:
                walk((*prefix, z), p * q)

    walk((), 1.0)
    return found


async def drawn(params: dict[str, Any], temperature: float) -> Counter[Ids]:
    engine = TabularEngine.of(PI0, adapters={"adapter": OTHER})
    answers: Counter[Ids] = Counter()
    for seed in range(N):
        sampling = SamplingSpec(PI0.horizon, temperature, seed=seed)
        ctx = tabular_context(engine, Scores({"r": Values(1)}), sampling=sampling)
        guide = LogitMix(LogitMix.Params.model_validate(params))
        answers[final(await run(guide, ctx)).candidates[0].token_ids] += 1
    return answers


@pytest.mark.parametrize(
    ("weight", "given", "share"),
    [(-0.8, None, 0.1), (-0.8, 0.4, 0.4), (-0.8, 0.0, 0.0), (0.7, None, 0.0), (0.7, 0.3, 0.3)],
)
async def test_answers_have_the_distribution_of_the_masked_mixture(
    weight: float, given: float | None, share: float
) -> None:
    """The mask is on by default where a weight is negative, and only there; it can be set either way."""
    params: dict[str, Any] = {"policies": [{"model": "adapter", "weight": weight}], "plausibility": given}
    temperature = 0.8
    wanted = exact(weight, share, temperature)
    found = await drawn(params, temperature)
    assert set(found) <= set(wanted)
    distance = sum(abs(found[answer] / N - p) for answer, p in wanted.items()) / 2
    assert distance < 1.2 * np.sqrt(len(wanted) / N)
    if weight < 0:
        other = exact(weight, 0.0 if share else 0.1, temperature)
        assert sum(abs(found[a] / N - other.get(a, 0)) for a in {*found, *other}) / 2 > distance + 0.05
