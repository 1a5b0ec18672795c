"""Rollouts that count what they cost, and stop at their request's token budget."""

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from guiderail.guides.core.guide import Rollouts
from guiderail.guides.core.types import Delta

if TYPE_CHECKING:
    from guiderail.guides.core.context import Context


class Counted:
    """Rollouts that add to their Context's spend and stop at its token budget."""

    def __init__(self, rollouts: Rollouts, mixed: Sequence[int], ctx: "Context") -> None:
        """mixed: for each row how many policies are mixed into it."""
        self._rollouts = rollouts
        self._rows = len(mixed)
        self._mixed = mixed
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
            spend.mixed_tokens += len(delta.token_ids) * self._mixed[delta.row]
            if budget is not None and not stopped and spend.tokens_generated >= budget:
                stopped = True
                for row in range(self._rows):
                    await self._rollouts.drop(row, "budget")
            yield delta

    async def drop(self, row: int, reason: str = "dropped") -> None:
        await self._rollouts.drop(row, reason)
