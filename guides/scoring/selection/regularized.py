"""Regularised best-of-N: argmax of the reward plus how typical the answer is of the policy.

Jinnai et al., arXiv 2404.01054 (MBR-BoN and RBoN-KL). Both hold best-of-N back from odd answers that a reward
overrates: by similarity to the other candidates, or by the policy's own probability.
"""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from guiderail.guides.scoring.kl import PoolKind
from guiderail.guides.scoring.selection.rule import Choice, Pool, Selection, decided
from guiderail.guides.scoring.transforms import Array, Bounded


class Mbr(Selection):
    """MBR-BoN: argmax of reward + beta x mean cosine similarity to all candidates, the answer itself included.

    beta -> 0 gives best-of-N, beta -> infinity minimum Bayes risk decoding: the candidate nearest to all others. As n
    grows it tends to the maximum of r(y) + beta E[similarity(y, y')] over y' of the base policy. Costs n L tokens, n
    scores and n embeddings.
    """

    name: Literal["mbr"] = "mbr"
    beta: Bounded = Field(default=0.5, gt=0, description="Reward that a similarity of 1 is worth.")
    valid_for: ClassVar[frozenset[PoolKind]] = frozenset({"answers", "blocks"})  # similarity to the policy's own

    async def pick(self, pool: Pool) -> Choice:
        rows = np.asarray(await pool.embed(pool.texts), dtype=np.float64)
        scores = pool.scores + self.beta * mean_similarity(rows)
        return decided(pool, pool.best(scores), scores)


def mean_similarity(rows: Array) -> Array:
    """Mean cosine of each of the unit rows [C, D] with all C of them: its cosine with their mean. O(C D)."""
    norms = np.linalg.norm(rows, axis=1)
    if rows.ndim != 2 or not np.allclose(norms, 1, atol=1e-3):
        raise ValueError("embeddings must be unit vectors, one a candidate")
    mean = rows.mean(axis=0)
    similarity: Array = (rows * mean).sum(axis=1)
    return similarity


class Likelihood(Selection):
    """RBoN-KL: argmax of reward + beta x log-probability of the answer under the policy.

    As n grows it tends to the answer of largest r + beta log pi0: with per "sum" the mode of pi0 e^(r / beta), the
    KL-regularised optimum. "sum" is the paper's, and favours short answers; "token" takes the mean over tokens, and
    does not. Costs n L tokens and n scores; log-probabilities come with the tokens.
    """

    name: Literal["likelihood"] = "likelihood"
    beta: Bounded = Field(gt=0, description="Reward that one nat is worth.")
    per: Literal["sum", "token"] = Field(description="Of the whole answer, or its mean over tokens.")
    needs_logprobs: ClassVar[bool] = True
    valid_for: ClassVar[frozenset[PoolKind]] = frozenset({"answers", "blocks", "survivors"})  # else it counts twice

    async def pick(self, pool: Pool) -> Choice:
        known = [logprob for logprob in pool.logprobs if logprob is not None]
        if len(known) < len(pool.scores):
            raise ValueError("likelihood needs the log-probability of every candidate")
        logprobs = np.array(known)
        if self.per == "token":
            logprobs /= np.maximum(1, np.asarray(pool.lengths))
        scores = pool.scores + self.beta * logprobs
        return decided(pool, pool.best(scores), scores)
