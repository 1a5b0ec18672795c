"""Rolls out a policy from several prompts at once and collects what each row became."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from guiderail.guides.core.context import Context
from guiderail.guides.core.types import SamplingSpec, TokenLogprob, TokenPrompt


@dataclass(slots=True)
class Piece:
    """One row of a rollout: its own text, tokens and end, as in Delta."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: int | str | None = None

    @property
    def cut_short(self) -> str | None:
        """The limit that ended the row ("deadline" or "budget"), or None."""
        return self.finish_reason if self.finish_reason in ("deadline", "budget") else None


async def roll_out(
    ctx: Context,
    prompts: Sequence[TokenPrompt],
    sampling: SamplingSpec,
    seeds: Sequence[int | None],
    on_finished: Callable[[int, Piece], None] = lambda row, piece: None,
) -> list[Piece]:
    """Continues prompts[i] with seeds[i] to its end; returns the rows in order.

    `on_finished(row, piece)` is called as each row ends. Raises EngineUnavailable, or RequestError for sampling
    parameters that the engine refuses.
    """
    pieces = [Piece() for _ in prompts]
    async with ctx.generate(prompts, sampling, seeds) as rollouts:
        async for delta in rollouts:
            piece = pieces[delta.row]
            piece.text += delta.text
            piece.token_ids.extend(delta.token_ids)
            piece.logprobs.extend(delta.logprobs or ())
            if delta.finish_reason is not None:
                piece.finish_reason, piece.stop_reason = delta.finish_reason, delta.stop_reason
                on_finished(delta.row, piece)
    return pieces
