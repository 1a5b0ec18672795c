"""Absence of an engine, for commands that only score: generation and log-probabilities are refused."""

from collections.abc import Sequence
from typing import NoReturn

from guiderail.guides.core.errors import EngineUnavailable
from guiderail.guides.core.types import SamplingSpec, TokenPrompt
from guiderail.server.engines.engine_stats import EngineStats


class EngineNeeded(EngineUnavailable):
    """The engine was asked for, but none was started."""


class NoEngine:
    """server.engines.served_engine.ServedEngine whose every use raises EngineNeeded."""

    max_model_len = vocab_size = max_logprobs = 0
    dtype = ""
    up = answers = False
    stats = EngineStats()

    async def start(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    def num_running(self) -> int:
        """Sequences in the engine: none."""
        return 0

    def generate(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: SamplingSpec,
        *,
        seeds: Sequence[int | None] | None = None,
        deadline: float | None = None,
    ) -> NoReturn:
        _refuse()

    async def next_token_logprobs(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[dict[int, float]]:
        _refuse()

    async def answer_logprobs(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        _refuse()


def _refuse() -> NoReturn:
    raise EngineNeeded("this needs the engine, and none was started")
