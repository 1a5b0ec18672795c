"""Values of partial answers: the expected reward of what a policy makes of them (lookahead).

For a partial answer s and a policy rho, Q(s) = E[r(s, tau)] over rollouts tau ~ rho(. | s), cut after `horizon`
tokens. A finished answer is its own only rollout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from guiderail.guides.core.context import Context
from guiderail.guides.core.seeds import ROLLOUT
from guiderail.guides.core.tasks import together
from guiderail.guides.core.types import Candidate, TokenPrompt
from guiderail.guides.prompters.prompter import Cleaner
from guiderail.guides.scoring.scores import Scores
from guiderail.guides.scoring.transforms import Array
from guiderail.guides.search.sequence import Piece, roll_out
from guiderail.guides.search.transcript import Transcript

Weigh = Callable[[Scores], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Lookahead:
    """A way to find values: the policy that is rolled out, `rollouts` a candidate, each of `horizon` tokens at most.

    horizon None: to the end of the answer. temperature None: the request's. stops, cleaner: of the policy's own
    prompter, as in Policy; they apply to what it writes.
    """

    policy: TokenPrompt
    rollouts: int = 1
    horizon: int | None = None
    temperature: float | None = None
    stops: tuple[str, ...] = ()
    cleaner: Callable[[str], Cleaner] | None = None

    def tokens(self, transcript: Transcript, piece: Piece) -> int:
        """Of a rollout that begins behind `piece`."""
        room = transcript.room - len(piece.token_ids)
        return room if self.horizon is None else min(self.horizon, room)

    def read(self, before: str, text: str) -> str:
        """The part of the policy's `text` behind `before` that belongs to the answer."""
        whole = before + text
        found = (whole.find(stop, max(0, len(before) - len(stop) + 1)) for stop in self.stops)
        text = text[: min((max(0, at - len(before)) for at in found if at >= 0), default=None)]
        return text if self.cleaner is None else self.cleaner(before).clean(text)


async def roll_forward(
    ctx: Context,
    transcript: Transcript,
    pieces: Sequence[Piece],
    ahead: Lookahead,
    step: int,
    known: Sequence[Sequence[Piece]] | None = None,
    stream: str = ROLLOUT,
) -> list[list[Piece]]:
    """Rollouts of each piece: none for one that ends the answer, else `ahead.rollouts`.

    known: for each piece rollouts that are there already, at most as many; they are extended to the horizon.
    step, stream: number the rollouts' seeds among all of the answer.
    """
    jobs: dict[tuple[int, int], list[tuple[int, Piece]]] = {}  # by the tokens they still want, and must have
    tails: list[list[Piece]] = []
    for index, piece in enumerate(pieces):
        rolled: list[Piece] = []
        if not transcript.candidate(index, piece).finished:
            rolled = list(known[index]) if known else []
            rolled += [Piece() for _ in range(ahead.rollouts - len(rolled))]
        for tail in rolled:
            want = ahead.tokens(transcript, piece) - len(tail.token_ids)
            if want > 0 and tail.finish_reason != "stop":
                due = max(0, transcript.due - len(piece.token_ids) - len(tail.token_ids))
                jobs.setdefault((want, min(want, due)), []).append((index, tail))
        tails.append(rolled)
    seeds = iter(ctx.seeds.stream(len(pieces) * ahead.rollouts, stream, step))

    async def extend(want: int, due: int, rolled: list[tuple[int, Piece]], seeds: Sequence[int | None]) -> None:
        prompts = [transcript.prompt(ahead.policy, (*pieces[i].token_ids, *tail.token_ids)) for i, tail in rolled]
        temperature = ctx.sampling.temperature if ahead.temperature is None else ahead.temperature
        sampling = replace(
            ctx.sampling, max_tokens=want, min_tokens=due, temperature=temperature, logprobs=None, stream=False,
            stop=tuple(dict.fromkeys((*ctx.sampling.stop, *ahead.stops))),
        )  # fmt: skip
        for (_, tail), more in zip(rolled, await roll_out(ctx, prompts, sampling, seeds), strict=True):
            tail.token_ids.extend(more.token_ids)
            tail.finish_reason, tail.stop_reason = more.finish_reason, more.stop_reason

    work = sorted(jobs.items(), reverse=True)
    await together(extend(want, due, rolled, list(islice(seeds, len(rolled)))) for (want, due), rolled in work)
    return tails


async def value(
    ctx: Context,
    transcript: Transcript,
    pieces: Sequence[Piece],
    tails: Sequence[Sequence[Piece]],
    weigh: Weigh | None = None,
    ahead: Lookahead | None = None,
) -> Scores:
    """Scores of each piece as a candidate, whose rewards and transformed rewards are the means over its rollouts.

    ahead: what the rollouts are from; needed where their policy has a prompter of its own.
    weigh: gives the rollouts of one candidate their weights in the means, from their scores; default: equal.
    A piece without rollouts is scored as it stands. Its combined score is the mean of the rollouts' combined rewards,
    or, where a combination compares candidates, that of the means over the pieces as a group.
    """
    candidates = [transcript.candidate(i, piece) for i, piece in enumerate(pieces)]
    groups = [[_rolled(ctx, transcript, i, pieces[i], tail, ahead) for tail in tails[i]] for i in range(len(pieces))]
    alone = [c for c, group in zip(candidates, groups, strict=True) if not group]
    every = await ctx.score([*alone, *(rollout for group in groups for rollout in group)])
    if not any(groups):
        return every
    rows: list[range] = []  # of each piece among all that was scored: its own, or its rollouts'
    own, rolled = 0, len(alone)
    for group in groups:
        rows.append(range(rolled, rolled + len(group)) if group else range(own, own + 1))
        own, rolled = own + (not group), rolled + len(group)
    shares = [
        weigh(every.group(at)) if weigh is not None and group else [1.0] * len(at)
        for at, group in zip(rows, groups, strict=True)
    ]

    def means(column: Array) -> Array:
        values = column.tolist()
        return np.array([_mean(values[at.start : at.stop], w) for at, w in zip(rows, shares, strict=True)])

    raw = {label: means(column) for label, column in every.raw.items()}
    scores = ctx.pipeline.table(candidates, raw, {label: means(c) for label, c in every.transformed.items()})
    return scores.with_combined(means(every.combined)) if every.combination.rule.pointwise else scores


def _rolled(
    ctx: Context, transcript: Transcript, index: int, piece: Piece, tail: Piece, ahead: Lookahead | None
) -> Candidate:
    """The answer that a rollout makes of a piece, without what its policy's own layout put behind it."""
    whole = transcript.candidate(index, piece, tail)
    if ahead is None or ahead.cleaner is None:
        return whole
    before = transcript.candidate(index, piece).text
    text = before + ahead.read(ctx.dialogue.begun + before, whole.text[len(before) :])
    if text == whole.text:
        return whole
    return replace(
        whole, text=text, token_ids=whole.token_ids[: ctx.dialogue.decoder().kept(whole.token_ids, len(text))]
    )


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    if len(values) == 1:
        return values[0]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def successors(tails: Sequence[Piece]) -> dict[tuple[int, ...], list[Piece]]:
    """Rollouts of a chosen candidate as rollouts of the tokens they go on with.

    A rollout (z', tau) of rho after s is a rollout tau of rho after (s, z').
    """
    found: dict[tuple[int, ...], list[Piece]] = {}
    for tail in tails:
        if len(tail.token_ids) > 1:
            rest = Piece("", tail.token_ids[1:], [], tail.finish_reason, tail.stop_reason)
            found.setdefault((tail.token_ids[0],), []).append(rest)
    return found
