"""The engine as one request has it: counts what it generates, and stops at the request's deadline and token budget."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from guiderail.guides.core.budget import Limits, Spend
from guiderail.guides.core.interfaces import Engine, Rollouts
from guiderail.guides.core.types import Delta, SamplingSpec, TokenPrompt


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
