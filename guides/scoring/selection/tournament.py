"""A tournament of pairwise comparisons by a judge, who sees two answers side by side instead of scoring each."""

import random
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from guiderail.guides.scoring.kl import PoolKind
from guiderail.guides.scoring.selection.rule import Choice, Pool, Selection, decided

ROUND_ROBIN_LIMIT = 64


class Tournament(Selection):
    """The winner of pairwise comparisons by a judge; combined rewards only break ties.

    single_elimination seats the candidates in an order shuffled by the seed, on a bracket of the next power of two P;
    a pair's likelier winner goes on. The P - n seats without an opponent pass the first round, and none passes
    another: they win with a chance of 2 / P if the judge tosses coins, the others with 1 / P, and as the seed deals the
    seats every candidate does with 1 / n. With a judge who is never inconsistent it finds the best of n, in n - 1
    comparisons. round_robin compares all n (n - 1) / 2 pairs and takes the largest mean win probability: as n grows,
    the answer with the largest win rate against the base policy, inconsistent judge or not. Ties go to the larger
    score, of equals to the larger raw reward, then to the first. Costs n L tokens and the comparisons, each in both
    orders.
    """

    name: Literal["tournament"] = "tournament"
    format: Literal["single_elimination", "round_robin"] = Field(
        default="single_elimination", description="n - 1 comparisons, or all n (n - 1) / 2."
    )
    criterion: str = Field(
        default="Which answer is more helpful, correct and harmless?",
        min_length=1,
        max_length=4000,
        description="What the judge is asked about two answers.",
    )
    valid_for: ClassVar[frozenset[PoolKind]] = frozenset({"answers", "blocks", "survivors", "beams"})

    def check(self, n: int) -> None:
        if self.format == "round_robin" and n > ROUND_ROBIN_LIMIT:
            raise ValueError(f"round_robin takes at most {ROUND_ROBIN_LIMIT} candidates, not {n}")

    async def pick(self, pool: Pool) -> Choice:
        return await (self._round_robin(pool) if self.format == "round_robin" else self._elimination(pool))

    async def _elimination(self, pool: Pool) -> Choice:
        standing = list(range(len(pool.scores)))
        random.Random(pool.seed).shuffle(standing)
        bracket = 1 << (len(standing) - 1).bit_length()
        byes = standing[2 * len(standing) - bracket :]  # all of them in the first round
        compared = 0
        while len(standing) > 1:
            seated = standing[: len(standing) - len(byes)]
            pairs = list(zip(seated[::2], seated[1::2], strict=True))
            wins = await self._ask(pool, pairs)
            standing = [self._winner(pool, a, b, win) for (a, b), win in zip(pairs, wins, strict=True)] + byes
            byes = []
            compared += len(pairs)
        return decided(pool, standing[0], detail={"comparisons": float(compared)})

    async def _round_robin(self, pool: Pool) -> Choice:
        n = len(pool.scores)
        self.check(n)
        pairs = [(a, b) for a in range(n) for b in range(a + 1, n)]
        rates = np.zeros(n)
        for (a, b), win in zip(pairs, await self._ask(pool, pairs), strict=True):
            rates[a] += win
            rates[b] += 1 - win
        rates /= max(1, n - 1)
        even = np.flatnonzero(rates == rates.max())
        index = int(even[_among(pool, even)])
        return decided(pool, index, rates, {"comparisons": float(len(pairs))})

    async def _ask(self, pool: Pool, pairs: list[tuple[int, int]]) -> list[float]:
        wins = await pool.prefer(self.criterion, pairs) if pairs else []
        if len(wins) != len(pairs) or not all(0 <= win <= 1 for win in wins):
            raise ValueError("the judge must give one probability a comparison")
        return wins

    @staticmethod
    def _winner(pool: Pool, a: int, b: int, win: float) -> int:
        """The likelier of a and b."""
        if win != 0.5:
            return a if win > 0.5 else b
        return (a, b)[_among(pool, np.array([a, b]))]


def _among(pool: Pool, indices: npt.NDArray[np.intp]) -> int:
    """Place in `indices` of the one with the largest score; of equals the best by `ties`, then the first."""
    ties = np.zeros(len(indices)) if pool.ties is None else pool.ties[indices]
    return int(np.lexsort((indices, -ties, -pool.scores[indices]))[0])
