"""Sequences of the engine: the one place that folds their deltas, and makes candidates of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from guiderail.guides.core.context import Context
from guiderail.guides.core.types import Candidate, Delta, SamplingSpec, TokenLogprob, TokenPrompt


@dataclass(slots=True)
class Piece:
    """The part of an answer that a sequence of the engine writes: its own text, tokens and end, as in Delta."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: int | str | None = None

    @property
    def cut_short(self) -> str | None:
        """The limit that ended the sequence ("deadline" or "budget"), or None."""
        return self.finish_reason if self.finish_reason in ("deadline", "budget") else None

    def take(self, delta: Delta) -> None:
        """Add what the sequence gained."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    def candidate(self, index: int) -> Candidate:
        """The sequence as a whole answer, "partial" while it goes on."""
        return Candidate(
            index, self.text, tuple(self.token_ids), self.finish_reason or "partial", self.stop_reason,
            tuple(self.logprobs) or None,
        )  # fmt: skip


async def roll_out(
    ctx: Context,
    prompts: Sequence[TokenPrompt],
    sampling: SamplingSpec,
    seeds: Sequence[int | None],
    on_finished: Callable[[int, Piece], None] = lambda index, piece: None,
) -> list[Piece]:
    """Continue prompts[i] with seeds[i] to its end; return the sequences in order.

    `on_finished(i, piece)` is called as each sequence ends. Raises EngineUnavailable, or RequestError for sampling
    parameters that the engine refuses.
    """
    pieces = [Piece() for _ in prompts]
    async with ctx.generate(prompts, sampling, seeds) as rollouts:
        async for delta in rollouts:
            piece = pieces[delta.row]
            piece.take(delta)
            if delta.finish_reason is not None:
                on_finished(delta.row, piece)
    return pieces
