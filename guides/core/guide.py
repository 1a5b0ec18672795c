"""The abstractions that meet in Guiderail: Engine, Scorer, Helpers and Guide.

A guide sees only its Context (context.py), which joins them. It yields events (types.py).
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict

from guiderail.guides.core.types import (
    Candidate,
    Delta,
    Event,
    Final,
    Message,
    SamplingSpec,
    ScoreGroup,
    Token,
    TokenPrompt,
)
from guiderail.guides.scoring import PoolKind, RewardTerm
from guiderail.guides.scoring.calibration_sample import CalibrationSample

if TYPE_CHECKING:
    import numpy as np

    from guiderail.guides.core.context import Context
    from guiderail.guides.core.reward import Services


class Params(BaseModel):
    """Parameters of a guide or reward: frozen, every field with a default, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Rollouts(Protocol):
    """Continuations being generated: iterate for deltas, drop rows that are not wanted any more.

    Iteration ends when every row has finished. Leaving the context frees all engine work at once.
    """

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def drop(self, row: int, reason: str = "dropped") -> None:
        """Stops one row; its last delta carries `reason` as finish_reason. No-op if it has finished."""
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
        """Continues each prompt once. Row i continues prompts[i] with seeds[i] (else sampling.seed).

        `deadline` is a time.monotonic() value; rows still running then end with "deadline".
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

    async def score(self, reward: str, group: ScoreGroup, owner: int = 0) -> ScoreResult:
        """`owner` tells requests apart, for fairness. Raises RewardFailed; RequestError for what a reward refuses."""
        ...


class Helpers(Protocol):
    """What transforms and selection rules need of the server besides engine and rewards."""

    @property
    def services(self) -> "Services":
        """Engine, renderer and the names of the served policies."""
        ...

    async def sample(self, ctx: "Context", term: RewardTerm, length: int | None = None) -> CalibrationSample:
        """Values of the reward under the base policy for the Context's prompt. Raises RewardFailed, DeadlinePassed.

        length: of the policy's answers cut after so many tokens, which partial answers of that length compare with.
        """
        ...

    async def embed(self, texts: Sequence[str]) -> "np.ndarray":
        """Sentence embeddings [N, D], rows of length 1."""
        ...

    async def prefer(
        self,
        messages: Sequence[Message],
        criterion: str,
        answers: Sequence[str],
        pairs: Sequence[tuple[int, int]],
    ) -> list[float]:
        """For each pair of indices the probability that a judge prefers the first answer, in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds one request: a time.monotonic() deadline and a number of generated tokens."""

    deadline: float | None = None
    max_tokens_generated: int | None = None


class Guide(ABC):
    """A guided decoder. Subclass it, describe it in the docstring's first line, and write `run`.

    streams: whether it commits text before its work is over.
    steers: whether rewards change its answer (else they are only reported).
    needs_rewards: whether a guide that steers cannot do without one.
    keeps_format: whether it can keep a `response_format` (each answer is one engine generation).
    """

    Params: ClassVar[type[Params]] = Params
    streams: ClassVar[bool] = False
    steers: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = True
    keeps_format: ClassVar[bool] = False

    def __init__(self, params: Any) -> None:
        self.params = params

    def candidates(self) -> int:
        """Largest number of candidates alive at once for one answer; operators limit it."""
        return 1

    def pools(self) -> Mapping[PoolKind, int]:
        """The pools that it has the selection rule choose from, and the most candidates that each has.

        A rule that is not valid for all of them is refused. A guide that declares none can have no rule but argmax;
        one that does without a rule (`steers` or rewards apart) declares none.
        """
        return {}

    def rows(self) -> int:
        """Largest number of rows in the engine at once for one answer; admission goes by it."""
        return self.candidates()

    def cost(self, max_tokens: int) -> int:
        """Most tokens of generation that an answer of `max_tokens` can take; admission goes by it."""
        return self.candidates() * max_tokens

    def refuses(self) -> Sequence[str]:
        """Sampling fields of a request that this guide cannot keep; one that is set is refused by name."""
        return ()

    def check(self, services: "Services") -> None:
        """Refuses parameters that are well-formed but cannot work here, by raising ValueError."""
        return

    @abstractmethod
    def run(self, ctx: "Context") -> AsyncGenerator[Event, None]:
        """Yields Token and Scored events and, last, exactly one Final. Closing it cancels the work."""
        ...


def answer_events(chosen: Candidate, candidates: Sequence[Candidate], stopped_by: str | None) -> tuple[Token, Final]:
    """The events that end a guide whose answer is a whole candidate."""
    reason = chosen.finish_reason if chosen.finished else "length"
    token = Token(chosen.text, chosen.token_ids, chosen.logprobs)
    return token, Final(reason, chosen.stop_reason, stopped_by, chosen.index, tuple(candidates))
