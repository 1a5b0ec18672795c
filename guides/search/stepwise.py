"""Common ground of guides that commit an answer step by step: limits between steps, events, the end."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace

from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import AlignmentField, DeadlinePassed, FieldError
from guiderail.guides.core.types import Candidate, Event, Scored, TokenLogprob
from guiderail.guides.scoring.kl import Origin, PoolKind
from guiderail.guides.scoring.pipeline import Pick
from guiderail.guides.scoring.scores import Scores
from guiderail.guides.search.sequence import Piece, roll_out
from guiderail.guides.search.transcript import Transcript

SERVED = 50  # log-probabilities that the engine serves
MAX_TOP_K = SERVED - 2  # end-of-sequence may have to be left out
# What a guide cannot keep that chooses tokens itself, from the policy as it is; temperature it can (Selection.at).
UNKEPT = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "top_p", "top_k", "min_p", "bad_words",
    "allowed_token_ids",
)  # fmt: skip

# The engine would count each block's tokens alone, and look for words within it.
UNKEPT_BY_BLOCKS = ("presence_penalty", "frequency_penalty", "bad_words")


class Steps:
    """The course of one answer: what is committed, how many steps it took, what ended it."""

    def __init__(self, ctx: Context, kind: PoolKind) -> None:
        """kind: of the pools that a step draws."""
        self._ctx = ctx
        self._kind = kind
        self.transcript = Transcript(ctx)
        self.count = 0
        self._stopped_by: str | None = None
        self._left: Sequence[Piece] = ()  # what a step that a limit cut short had drawn
        self._ended: Scores | None = None  # of the whole answer alone, once it is there

    def go_on(self, tokens: int) -> bool:
        """True if there is a next step, which costs `tokens` at least: not after the end or at a limit."""
        if self._ended is None and self._stopped_by is None:
            self._stopped_by = self._ctx.engine.over(tokens)
        return self._ended is None and self._stopped_by is None

    def cut_short(self, drawn: Sequence[Piece], pieces: Sequence[Piece] | None = None) -> bool:
        """True if a limit ended some of what a step drew. Then the step is not taken.

        pieces: what may be committed instead of the step, if it is not what was drawn.
        """
        limits = [piece.cut_short for piece in drawn if piece.cut_short]
        if limits:
            self._stopped_by = limits[0]
            self._left = drawn if pieces is None else pieces
        return bool(limits)

    def commit(self, piece: Piece, pick: Pick) -> Iterator[Event]:
        """Take a piece into the answer; the chosen candidate is the answer with it. The events of the step."""
        self.count += 1
        self.transcript.commit(piece)
        self._ended = pick.scores.take([pick.row]) if pick.chosen.finished else None
        yield Scored(pick.candidates)
        yield self.transcript.token(last=pick.chosen.finished)

    def catch_up(
        self, beams: Sequence[Transcript], candidates: Sequence[Candidate], ended: Scores | None = None
    ) -> Iterator[Event]:
        """Commit what all beams agree on. The events of the step.

        ended: scores of the whole answer alone, if the search is over; it is that of the first beam, and there is no
        other.
        """
        self.count += 1
        self._ended = ended
        if candidates:
            yield Scored(tuple(candidates))
        agreed = [len(set(tokens)) == 1 for tokens in zip(*(beam.token_ids for beam in beams), strict=False)]
        upto = (*agreed, False).index(False)
        if upto > len(self.transcript.token_ids) or ended is not None:
            self.transcript.follow(beams[0], upto)
            yield self.transcript.token(last=ended is not None)

    async def end(
        self, finish_reason: str = "length", stop_reason: int | str | None = None
    ) -> AsyncGenerator[Event, None]:
        """The last events: text that was held back, and Final with the whole answer's rewards.

        finish_reason, stop_reason: what clients are told of an answer that the guide ended, by leaving its loop.
        After a limit the best of the whole answers that the last step drew is taken, or, if there is nothing else,
        its longest piece. Raises DeadlinePassed, or FieldError for a budget, if there is nothing.
        """
        if self._ended is None:
            await self._make_do()
            yield self.transcript.token(last=True)
        answer = self.transcript.whole()
        scores = await self._ctx.score([answer]) if self._ended is None else Scores.join([self._ended])
        yield self.transcript.final(scores.of(0, answer), self._stopped_by, finish_reason, stop_reason)

    async def _make_do(self) -> None:
        """Commit what a limit left, as far as it can be used."""
        whole = [c for i, piece in enumerate(self._left) if (c := self.transcript.candidate(i, piece)).finished]
        if whole:
            scores = await self._ctx.score(whole)
            pick = await self._ctx.select(scores, self._origin([self._left[c.index] for c in whole]))
            self._ended = scores.take([pick.row])
            self.transcript.commit(self._left[pick.chosen.index])
        elif not self.transcript.token_ids and self._stopped_by is not None:
            longest = max(self._left, key=lambda piece: len(piece.token_ids), default=Piece())
            if not longest.token_ids:
                if self._stopped_by == "budget":
                    raise FieldError(AlignmentField("budget"), " leaves no room for a first token of this guide's")
                raise DeadlinePassed("the deadline left no room for a first token")
            self.transcript.commit(longest)
            self._ctx.report.moved(self._origin([longest]).kl_of(0, 1))

    def _origin(self, pieces: Sequence[Piece]) -> Origin:
        """Of pieces that a step which was cut short had drawn."""
        if self._kind == "blocks":
            return Origin("blocks", len(self._left))
        return Origin("tokens", log_prior=[piece.logprobs[0].logprob for piece in pieces])


async def draw_blocks(ctx: Context, transcript: Transcript, k: int, block: int, step: int) -> list[Piece]:
    """k continuations of what is committed, of at most `block` tokens each, drawn from the policy."""
    sampling = replace(
        ctx.sampling,
        stream=False,
        max_tokens=min(block, transcript.room),
        min_tokens=min(block, transcript.due),
    )
    return await roll_out(ctx, [transcript.prompt()] * k, sampling, ctx.seeds.stream(k, step=step))


async def top_tokens(ctx: Context, transcript: Transcript, k: int) -> list[Piece]:
    """The policy's k likeliest next tokens as pieces of one token, their log-probabilities (temperature 1) with them.

    An end-of-sequence token is a piece that ends the answer; it is left out before min_tokens and under ignore_eos.
    """
    eos = ctx.dialogue.renderer.eos_token_ids
    ends = {*ctx.sampling.stop_token_ids, *(() if ctx.sampling.ignore_eos else eos)}
    barred = {*eos, *ends} if transcript.due else eos if ctx.sampling.ignore_eos else set()
    count = ctx.sampling.logprobs or 0
    (found,) = await ctx.next_tokens([transcript.prompt()], min(SERVED, max(k + len(barred), count)))
    pieces = []
    for token, logprob in [each for each in found if each[0] not in barred][:k]:
        piece = Piece("", [token], [TokenLogprob(token, logprob, tuple(found[:count]))], "length")
        if token in ends:
            piece.finish_reason, piece.stop_reason = "stop", None if token in eos else token
        pieces.append(piece)
    return pieces
