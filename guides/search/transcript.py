"""The answer of a guide that commits it piece by piece: its tokens, its text across borders, its stop strings.

A piece may end inside a character or a stop string. Text is therefore decoded from all the answer's tokens, and
what may still change or turn out to be a stop string is held back from the stream. Text and stops are vLLM's: tokens
that end in half a character are not shown, a token that ends the answer is no part of the text, and of several stop
strings the one that is complete first counts (of several at once the first in the list).
"""

from collections.abc import Sequence
from copy import copy

from guiderail.guides.core.context import Context
from guiderail.guides.core.types import Candidate, Final, Token, TokenPrompt
from guiderail.guides.search.sequence import Piece


class Transcript:
    """The committed part of one answer, and the candidates that its continuations would be."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._decoder = ctx.dialogue.decoder()
        self._sent = 0  # characters that were streamed
        self._sent_tokens = 0
        self._committed = Candidate(0, "", (), "partial")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The committed tokens."""
        return self._committed.token_ids

    @property
    def room(self) -> int:
        """Tokens left of the answer's limit."""
        return self._ctx.sampling.max_tokens - len(self.token_ids)

    @property
    def due(self) -> int:
        """Tokens that must still come before the answer may end (min_tokens)."""
        return max(0, self._ctx.sampling.min_tokens - len(self.token_ids))

    def prompt(self, policy: TokenPrompt | None = None, ids: Sequence[int] = ()) -> TokenPrompt:
        """The prompt of a policy (default: the served one) with what is committed, and `ids`, behind it."""
        return (policy or self._ctx.prompt).extended((*self.token_ids, *ids))

    def candidate(self, index: int, piece: Piece, more: Piece | None = None) -> Candidate:
        """The whole answer if `piece`, and then a rollout's `more`, came next.

        Its finish_reason is "stop" or "length" if that would be its end, else "partial" (or the limit that cut it).
        """
        ids = (*self.token_ids, *piece.token_ids, *(more.token_ids if more else ()))
        last = more or piece
        reason, stop_reason = last.finish_reason, last.stop_reason
        text = self._text(ids, ended_by_token=reason == "stop" and not isinstance(stop_reason, str))
        stop = self._stop(ids, text)
        if stop is not None:
            reason, (stop_reason, end) = "stop", stop
            begin = end - len(stop_reason)
            while self._stop(ids[:-1]) is not None:
                ids = ids[:-1]  # what came behind the stop string, inside its block, is not of the answer
            text = text[: end if self._ctx.sampling.include_stop_str_in_output else begin]
        elif reason == "length" and len(ids) < self._ctx.sampling.max_tokens:
            reason = "partial"
        logprobs = (*(self._committed.logprobs or ()), *piece.logprobs)[: len(ids)]
        return Candidate(index, text, ids, reason or "partial", stop_reason, logprobs or None)

    def whole(self) -> Candidate:
        """The committed part, as a candidate."""
        return self._committed

    def commit(self, piece: Piece) -> None:
        """Take a piece into the answer."""
        self._committed = self.candidate(0, piece)

    def follow(self, other: "Transcript", upto: int) -> None:
        """Commit the first `upto` tokens of another transcript of the same answer."""
        theirs, start = other._committed, len(self.token_ids)
        new = Piece("", list(theirs.token_ids[start:upto]), list((theirs.logprobs or ())[start:upto]), "length")
        if upto == len(theirs.token_ids):
            new.finish_reason, new.stop_reason = theirs.finish_reason, theirs.stop_reason
        self.commit(new)

    def token(self, *, last: bool) -> Token:
        """The event for what was committed: the text that will not change any more; all of it if it is the last."""
        answer, sampling = self._committed, self._ctx.sampling
        upto = len(answer.text)
        if not last:
            upto -= max((_overlap(answer.text, stop) for stop in sampling.stop), default=0)
        upto = max(upto, self._sent)
        text, self._sent = answer.text[self._sent : upto], upto
        start, self._sent_tokens = self._sent_tokens, len(answer.token_ids)
        return Token(text, answer.token_ids[start:], (answer.logprobs or ())[start:] or None)

    def final(
        self,
        answer: Candidate,
        stopped_by: str | None = None,
        finish_reason: str = "length",
        stop_reason: int | str | None = None,
    ) -> Final:
        """The event that ends the answer; `answer` is the committed whole, with its rewards.

        finish_reason, stop_reason: of an answer that neither its own end nor a limit has ended, but the guide.
        """
        if answer.finished:
            finish_reason, stop_reason = answer.finish_reason, answer.stop_reason
        elif stopped_by is not None:
            finish_reason, stop_reason = "length", answer.stop_reason
        return Final(finish_reason, stop_reason, stopped_by, 0, (answer,))

    def fork(self) -> "Transcript":
        """A copy that goes its own way."""
        return copy(self)

    def _text(self, ids: Sequence[int], *, ended_by_token: bool = False) -> str:
        """Of the answer's tokens. A token that ended the answer shows only if stops are to be included."""
        if ended_by_token and not self._ctx.sampling.include_stop_str_in_output:
            ids = ids[:-1]
        return self._decoder.text(ids)

    def _stop(self, ids: Sequence[int], text: str | None = None) -> tuple[str, int] | None:
        """The stop string in the answer's text and where it ends, or None. It must end behind the first min_tokens."""
        sampling = self._ctx.sampling
        if not sampling.stop:
            return None
        text = self._text(ids) if text is None else text
        protected = len(self._text(ids[: sampling.min_tokens])) if sampling.min_tokens else 0
        found = []
        for order, stop in enumerate(sampling.stop):
            at = text.find(stop, max(0, protected + 1 - len(stop)))
            if at >= 0:
                found.append((at + len(stop), order))
        if not found:
            return None
        end, order = min(found)
        return sampling.stop[order], end


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
