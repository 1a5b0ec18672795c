"""A request's limits, what it costs, and its engine, which counts what it generates and stops at the limits."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from guiderail.guides.core.interfaces import Engine, Rollouts
from guiderail.guides.core.types import Delta, SamplingSpec, TokenPrompt


class Stopwatch:
    """Wall time during which at least one of possibly many overlapping spans was open, in seconds."""

    def __init__(self) -> None:
        self._open = 0
        self._since = 0.0
        self._total = 0.0

    @contextmanager
    def span(self) -> Iterator[None]:
        """Count the time inside the block; overlapping blocks are counted once."""
        if self._open == 0:
            self._since = time.monotonic()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if self._open == 0:
                self._total += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        """Time so far, the span that is open now included."""
        return self._total + (time.monotonic() - self._since if self._open else 0.0)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request: a time.monotonic() deadline and a number of generated tokens."""

    deadline: float | None = None
    max_tokens_generated: int | None = None


@dataclass(slots=True)
class Spend:
    """Tokens, calls and time of one request, over all its answers.

    Tokens are the served model's, except `reward_tokens`, which are the reward models' (0 for rewards
    that read no tokens). `rollouts` are sequences given to the engine; `reward_calls` are score calls.
    `calibration_tokens` were generated for a calibration pool and are counted nowhere else; requests that
    share the pool do not pay for it again. `queued_s`: waited for admission.
    `mixed_tokens`: forward passes of policies that were mixed into sequences.
    """

    prompt_tokens: int = 0
    tokens_generated: int = 0
    tokens_accepted: int = 0
    calibration_tokens: int = 0
    rollouts: int = 0
    reward_calls: int = 0
    reward_tokens: int = 0
    mixed_tokens: int = 0
    queued_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    generation: Stopwatch = field(default_factory=Stopwatch)
    scoring: Stopwatch = field(default_factory=Stopwatch)
    working: Stopwatch = field(default_factory=Stopwatch)

    @property
    def tokens_discarded(self) -> int:
        """Generated and not in an answer. A guide may answer with tokens that it did not generate: none then."""
        return max(0, self.tokens_generated - self.tokens_accepted)

    def report(self) -> dict[str, float]:
        """Metrics of the response. Generation and scoring may overlap; waiting is the rest of the total."""
        total = time.monotonic() - self.started
        return {
            "prompt_tokens": self.prompt_tokens,
            "tokens_generated": self.tokens_generated,
            "tokens_accepted": self.tokens_accepted,
            "tokens_discarded": self.tokens_discarded,
            "calibration_tokens": self.calibration_tokens,
            "mixed_tokens": self.mixed_tokens,
            "rollouts": self.rollouts,
            "reward_calls": self.reward_calls,
            "reward_tokens": self.reward_tokens,
            "generation_s": round(self.generation.seconds, 4),
            "scoring_s": round(self.scoring.seconds, 4),
            "queued_s": round(self.queued_s, 4),
            "waiting_s": round(max(0.0, total - self.working.seconds), 4),
            "total_s": round(total, 4),
        }


@dataclass(frozen=True, slots=True)
class MeteredEngine:
    """An engine whose work is counted in `spend` and ends at `limits`; what needs no bounds asks `engine` itself."""

    engine: Engine
    limits: Limits
    spend: Spend

    def generate(self, prompts: Sequence[TokenPrompt], sampling: SamplingSpec, seeds: Sequence[int | None]) -> Rollouts:
        """Continue prompts[i] with seeds[i], as Engine.generate does.

        Sequences that reach a limit end with the finish_reason "deadline" or "budget".
        """
        if self.limits.max_tokens_generated is not None:  # shared with what else the request has in the engine
            sampling = replace(sampling, stream=True)  # tokens have to be seen to be counted in time
        rollouts = self.engine.generate(prompts, sampling, seeds=seeds, deadline=self.limits.deadline)
        return _Counted(rollouts, [len(prompt.mix) for prompt in prompts], self)

    async def next_tokens(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[list[tuple[int, float]]]:
        """After each prompt the `top_k` likeliest tokens, likeliest first, and their log-probabilities (temperature 1).

        Costs one generated token for each prompt.
        """
        self.spend.tokens_generated += len(prompts)
        self.spend.rollouts += len(prompts)
        with self.spend.generation.span(), self.spend.working.span():
            found = await self.engine.next_token_logprobs(prompts, top_k)
        return [sorted(each.items(), key=lambda item: (-item[1], item[0]))[:top_k] for each in found]

    def over(self, tokens: int = 0) -> str | None:
        """The limit that leaves no room for `tokens` more: "deadline", "budget" or None."""
        deadline, budget = self.limits.deadline, self.limits.max_tokens_generated
        if deadline is not None and time.monotonic() >= deadline:
            return "deadline"
        return "budget" if budget is not None and self.spend.tokens_generated + tokens > budget else None

    def remaining(self) -> float | None:
        """Seconds to the deadline, at least 0; None if there is no deadline."""
        return None if self.limits.deadline is None else max(0.0, self.limits.deadline - time.monotonic())


class _Counted:
    """Rollouts that add to the spend and stop at the token budget."""

    def __init__(self, rollouts: Rollouts, mixed: Sequence[int], engine: MeteredEngine) -> None:
        """mixed: for each sequence how many policies are mixed into it."""
        self._rollouts = rollouts
        self._mixed = mixed
        self._spend = engine.spend
        self._budget = engine.limits.max_tokens_generated
        self._clock = ExitStack()

    async def __aenter__(self) -> Self:
        self._spend.rollouts += len(self._mixed)
        await self._rollouts.__aenter__()
        self._clock.enter_context(self._spend.generation.span())
        self._clock.enter_context(self._spend.working.span())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.close()
        await self._rollouts.__aexit__(kind, error, trace)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        spend, stopped = self._spend, False
        async for delta in self._rollouts:
            spend.tokens_generated += len(delta.token_ids)
            spend.mixed_tokens += len(delta.token_ids) * self._mixed[delta.row]
            if self._budget is not None and not stopped and spend.tokens_generated >= self._budget:
                stopped = True
                for row in range(len(self._mixed)):
                    await self._rollouts.drop(row, "budget")
            yield delta

    async def drop(self, row: int, reason: str = "dropped") -> None:
        await self._rollouts.drop(row, reason)
