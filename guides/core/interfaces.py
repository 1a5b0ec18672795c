"""Interfaces of what guides, rewards and the scoring of answers use of a server; each says the least that is needed."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from guiderail.guides.core.types import Delta, Message, SamplingSpec, ScoreGroup, TokenPrompt


class Rollouts(Protocol):
    """Continuations being generated: iterate for deltas, drop sequences that are not wanted any more.

    Iteration ends when every sequence has finished. Leaving the context frees all engine work at once.
    """

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def drop(self, row: int, reason: str = "dropped") -> None:
        """Stop the sequence of number `row`; its last delta carries `reason` as finish_reason.

        No-op if it has finished.
        """
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Engine(Protocol):
    """A policy that continues token-id prompts, always in batches."""

    def generate(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: SamplingSpec,
        *,
        seeds: Sequence[int | None] | None = None,
        deadline: float | None = None,
    ) -> Rollouts:
        """Continue each prompt once: sequence i continues prompts[i] with seeds[i] (else sampling.seed).

        `deadline` is a time.monotonic() value; sequences still running then end with "deadline".
        Raises (on iteration) EngineUnavailable, or RequestError for parameters it cannot take.
        """
        ...

    async def next_token_logprobs(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[dict[int, float]]:
        """Log-probabilities of the `top_k` likeliest next tokens after each prompt, by token id."""
        ...

    async def answer_logprobs(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-probability of each token of answers[i] after prompts[i] and the tokens before it."""
        ...


class Renderer(Protocol):
    """Turns messages into a prompt for the served model, and token ids into text."""

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> TokenPrompt: ...

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]: ...

    def encode_prompt(self, text: str, *, opens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class Services:
    """Parts of the server that a reward may use: the engine, its renderer, the names of its model and LoRA adapters.

    remote: names of policies on other servers, which can be rolled out and nothing else. context: gives the tokens of
    prompt and answer that the engine takes together, 0 while it has not started.
    """

    engine: Engine
    renderer: Renderer
    adapters: frozenset[str] = frozenset()
    model_name: str = ""
    remote: frozenset[str] = frozenset()
    context: Callable[[], int] = lambda: 0


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Raw values of one score call, one per answer, and the reward-model tokens it cost.

    warnings: what the client should know of how the values came about; they stand in the response.
    """

    values: tuple[float, ...]
    tokens: int = 0
    warnings: tuple[str, ...] = ()


class Scorer(Protocol):
    """Scores groups of answers with rewards by name; batches across the requests in flight."""

    async def score(self, reward: str, group: ScoreGroup, owner: str = "") -> ScoreResult:
        """Score one group. `owner` tells requests apart, for fairness.

        Raises RewardFailed; RequestError for what a reward refuses.
        """
        ...


class Embedder(Protocol):
    """Sentence embeddings, for selection rules that compare answers."""

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Sentence embeddings [N, D], rows of length 1."""
        ...


class Judge(Protocol):
    """A judge between two answers, for selection rules that hold tournaments."""

    async def prefer(
        self,
        messages: Sequence[Message],
        criterion: str,
        answers: Sequence[str],
        pairs: Sequence[tuple[int, int]],
    ) -> list[float]:
        """For each pair of indices the probability that the judge prefers the first answer, in [0, 1]."""
        ...
