"""The abstractions that meet in Guiderail: Engine, Scorer, Guide, and the Context that joins them.

A guide sees only its Context. It draws rollouts from the policy with `ctx.generate`, scores answers
with `ctx.score`, chooses with `ctx.select`, and yields events (types.py). The Context counts what
that costs and enforces deadline and token budget, so every guide is costed and bounded alike.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict

from guiderail.guides.errors import RewardFailed
from guiderail.guides.pipeline import RewardTerm, Selection, combine
from guiderail.guides.spend import Spend
from guiderail.guides.tasks import together
from guiderail.guides.types import (
    Answer,
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
    """Raw values of one score call, one per answer, and the reward-model tokens it cost."""

    values: tuple[float, ...]
    tokens: int = 0


class Scorer(Protocol):
    """Scores groups of answers with rewards by name; batches across the requests in flight."""

    async def score(self, reward: str, group: ScoreGroup, owner: int = 0) -> ScoreResult:
        """`owner` tells requests apart, for fairness. Raises RewardFailed when the reward fails."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds one request: a time.monotonic() deadline and a number of generated tokens."""

    deadline: float | None = None
    max_tokens_generated: int | None = None


@dataclass(slots=True)
class Context:
    """Everything a guide may use for one answer. `choice` numbers the answers of one request (its `n`)."""

    engine: Engine
    scorer: Scorer
    messages: tuple[Message, ...]
    prompt: TokenPrompt
    sampling: SamplingSpec
    rewards: tuple[RewardTerm, ...]
    selection: Selection
    limits: Limits
    spend: Spend
    choice: int = 0

    def seeds(self, n: int) -> list[int | None]:
        """Seeds of this choice's n rollouts: the request's seed, counted on through all its choices."""
        seed = self.sampling.seed
        return [None if seed is None else seed + self.choice * n + i for i in range(n)]

    def generate(self, prompts: Sequence[TokenPrompt], sampling: SamplingSpec, seeds: Sequence[int | None]) -> Rollouts:
        """Engine.generate, counted in `spend` and cut off at the request's limits."""
        budget = self.limits.max_tokens_generated
        if budget is not None and self.spend.tokens_generated + len(prompts) * sampling.max_tokens > budget:
            sampling = replace(sampling, stream=True)  # tokens have to be seen to be counted in time
        rollouts = self.engine.generate(prompts, sampling, seeds=seeds, deadline=self.limits.deadline)
        return _Counted(rollouts, len(prompts), self)

    async def score(self, candidates: Sequence[Candidate]) -> None:
        """Fills `rewards` and `combined` of the candidates, from all rewards of the request.

        Raises RewardFailed if a reward fails or returns a value that is not finite.
        """
        if not candidates or not self.rewards:
            return
        answers = tuple(Answer(c.text, c.token_ids, partial=not c.finished) for c in candidates)
        with self.spend.scoring.span(), self.spend.working.span():
            results = await together(
                self.scorer.score(
                    term.name, ScoreGroup(self.messages, self.prompt, answers, term.params), id(self.spend)
                )
                for term in self.rewards
            )
        for term, result in zip(self.rewards, results, strict=True):
            self.spend.reward_calls += 1
            self.spend.reward_tokens += result.tokens
            for candidate, value in zip(candidates, result.values, strict=True):
                candidate.rewards[term.label] = value
        for candidate in candidates:
            candidate.combined = combine(self.rewards, candidate.rewards)

    def select(self, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate that the request's selection rule picks. All must be scored."""
        scores = []
        for candidate in candidates:
            if candidate.combined is None:
                raise RewardFailed("(selection)", f"candidate {candidate.index} was never scored")
            scores.append(candidate.combined)
        return candidates[self.selection.pick(scores, seed=self.seeds(1)[0])]


class _Counted:
    """Rollouts that add to their Context's spend and stop at its token budget."""

    def __init__(self, rollouts: Rollouts, rows: int, ctx: Context) -> None:
        self._rollouts = rollouts
        self._rows = rows
        self._ctx = ctx
        self._clock = ExitStack()

    async def __aenter__(self) -> Self:
        self._ctx.spend.rollouts += self._rows
        await self._rollouts.__aenter__()
        self._clock.enter_context(self._ctx.spend.generation.span())
        self._clock.enter_context(self._ctx.spend.working.span())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.close()
        await self._rollouts.__aexit__(kind, error, trace)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        spend, budget = self._ctx.spend, self._ctx.limits.max_tokens_generated
        stopped = False
        async for delta in self._rollouts:
            spend.tokens_generated += len(delta.token_ids)
            if budget is not None and not stopped and spend.tokens_generated >= budget:
                stopped = True
                for row in range(self._rows):
                    await self._rollouts.drop(row, "budget")
            yield delta

    async def drop(self, row: int, reason: str = "dropped") -> None:
        await self._rollouts.drop(row, reason)


class Guide(ABC):
    """A guided decoder. Subclass it, describe it in the docstring's first line, and write `run`.

    streams: whether it commits text before its work is over.
    steers: whether rewards change its answer (else they are only reported).
    keeps_format: whether it can keep a `response_format` (each answer is one engine generation).
    """

    Params: ClassVar[type[Params]] = Params
    streams: ClassVar[bool] = False
    steers: ClassVar[bool] = True
    keeps_format: ClassVar[bool] = False

    def __init__(self, params: Any) -> None:
        self.params = params

    def candidates(self) -> int:
        """Largest number of candidates alive at once for one answer; operators limit it."""
        return 1

    @abstractmethod
    def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        """Yields Token and Scored events and, last, exactly one Final. Closing it cancels the work."""
        ...


def answer_events(chosen: Candidate, candidates: Sequence[Candidate], stopped_by: str | None) -> tuple[Token, Final]:
    """The events that end a guide whose answer is a whole candidate."""
    reason = chosen.finish_reason if chosen.finished else "length"
    token = Token(chosen.text, chosen.token_ids, chosen.logprobs)
    return token, Final(reason, chosen.stop_reason, stopped_by, chosen.index, tuple(candidates))
