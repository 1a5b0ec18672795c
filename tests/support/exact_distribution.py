"""The distribution by which a token-level guide draws its answers, without drawing them: it is led along each answer in turn.

At each step the guide's scores give the softmax by which it would draw the next token. `Follow` notes that and then
takes the answer's own token. The product along an answer is the probability that the guide gives it, for the rollouts
that it saw; its mean over seeds is the guide's distribution.
"""

import random
from typing import Any, Literal

import numpy as np
from contexts import run
from tabular import EOS, Distribution, Ids, Tabular
from tabular_context import tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.core.context import Context
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import SamplingSpec
from guiderail.guides.scoring.selection.divergence import softmax
from guiderail.guides.scoring.selection.rule import Choice, Pool, Selection


class Follow(Selection):
    """Softmax that is made to choose the tokens of `path`; `distribution` gets the probability of each token it could take."""

    name: Literal["follow"] = "follow"
    path: tuple[int, ...]
    beta: float = 1.0
    distributions: Any = None

    async def pick(self, pool: Pool) -> Choice:
        weights = softmax(pool.scores, self.beta)
        tokens = [_last_token(text, length) for text, length in zip(pool.texts, pool.lengths, strict=True)]
        self.distributions.append(dict(zip(tokens, weights.tolist(), strict=True)))
        index = tokens.index(self.path[len(self.distributions) - 1])
        return Choice(index, pool.kl(weights), weights=weights)


def _last_token(text: str, length: int) -> int:
    return EOS if len(text) < length else ord(text[-1]) - ord("a") + 1


async def led(
    guide: Guide,
    engine: TabularEngine,
    scores: Any,
    answer: Ids,
    horizon: int,
    seed: int,
    beta: float = 1.0,
    **more: Any,
) -> tuple[list[dict[int, float]], Context]:
    """Runs the guide along an answer: the distribution of the next token at each step, and the Context after it."""
    distributions: list[dict[int, float]] = []
    rule = Follow(path=answer, beta=beta, distributions=distributions)
    sampling = SamplingSpec(max_tokens=horizon, seed=seed)
    ctx = tabular_context(engine, scores, selection=rule, sampling=sampling, **more)
    await run(guide, ctx)
    return distributions, ctx


async def distribution_of(
    guide: Guide,
    engine: TabularEngine,
    scores: Any,
    policy: Tabular,
    *,
    repeats: int = 1,
    beta: float = 1.0,
    **more: Any,
) -> Distribution:
    """The guide's probability of each answer of `policy`, over `repeats` seeds."""
    seeds = random.Random(0)
    found: Distribution = {}
    for answer in policy.answers():
        total = 0.0
        for _ in range(repeats):
            distributions, _ = await led(
                guide, engine, scores, answer, policy.horizon, seeds.getrandbits(62), beta, **more
            )
            total += float(np.prod([distribution[z] for distribution, z in zip(distributions, answer, strict=True)]))
        found[answer] = total / repeats
    return found
