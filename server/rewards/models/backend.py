"""Runners of reward models, as rewards see them: token sequences in, raw values out. Knows no texts and no torch."""

from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Protocol

from guiderail.guides.core.reward import Reward
from guiderail.guides.core.types import P_co
from guiderail.server.engines.engine_stats import RunnerStats

Text = tuple[Sequence[int], int]  # token ids, and the position at which the answer starts in them


class Backend(Protocol):
    """Scorer of token sequences: the packed runner, a vLLM pooling engine here, or such servers elsewhere."""

    heads: int
    stats: RunnerStats

    @property
    def up(self) -> bool:
        """False once it can score no more. Asks no other server."""
        ...

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return [S][heads] raw values after the last token of each sequence."""
        ...

    async def close(self) -> None: ...


class ModelReward(Reward[P_co]):
    """A reward whose model counts its tokens."""

    @property
    @abstractmethod
    def stats(self) -> RunnerStats | None:
        """Counts of the backend, once it is loaded."""
        ...


@cache
def scoring_thread() -> ThreadPoolExecutor:
    """Return the one thread of this process that runs torch, for all reward models, their loading included.

    GNU OpenMP keeps a pool of workers for each thread that ever ran a parallel region. As soon as there are
    more of them than cores it stops spinning at barriers, which makes scoring a third slower on two cores.
    Its priority is the engine's: at a lower one it starved while idle vLLM processes polled for work.
    """
    return ThreadPoolExecutor(1, "guiderail-reward")
