"""The engine as the server meets it: guiderail.guides.Engine with its limits, its health and its end."""

from typing import Protocol

from guiderail.guides.core.interfaces import Engine
from guiderail.server.engines.engine_stats import EngineStats


class BoundedEngine(Engine, Protocol):
    """An engine with its limits and counts.

    max_model_len: tokens of prompt and answer. vocab_size: tokens. max_logprobs: alternatives per token. dtype: torch's
    name of it, as in "float32". All are 0 or "" until it has started.
    """

    max_model_len: int
    vocab_size: int
    max_logprobs: int
    dtype: str

    @property
    def up(self) -> bool:
        """True while it serves requests."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Counts since its start."""
        ...

    def num_running(self) -> int:
        """Sequences it has not finished, running and waiting."""
        ...


class ServedEngine(BoundedEngine, Protocol):
    """An engine that routes and metrics look at."""

    @property
    def answers(self) -> bool:
        """True while it serves requests and gives signs of life."""
        ...


class LocalEngine(BoundedEngine, Protocol):
    """An engine with processes of its own, which can die. Once it is not `up` it never is again."""

    async def answer(self) -> None:
        """Return once its processes have answered a question that costs them nothing."""
        ...

    async def cause_of_death(self) -> str:
        """Return why its processes ended, in one line. May take some seconds."""
        ...

    async def close(self) -> None:
        """End its processes."""
        ...
