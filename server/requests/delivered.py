"""Log-probabilities of delivered text alone: of the tokens whose whole text a client has been sent.

An engine's tokens go on where the text ends: with a stop string, the end-of-sequence token, and all that a prompter's
cleaner cuts. What is held back or cut must not be told by its log-probabilities, or by the alternatives in them.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from guiderail.guides.core.decoder import Decoder
from guiderail.guides.core.types import TokenLogprob

SPAN = 16  # tokens before the new ones that are decoded again, for decoders that look back


class Delivered:
    """The log-probabilities of one answer on their way to the client."""

    def __init__(self, decoder: Decoder) -> None:
        """decoder: gives the text of the answer's tokens."""
        self._decoder = decoder
        self._ids: list[int] = []
        self._waiting: list[tuple[int, int, TokenLogprob]] = []  # where a token's text begins and ends, not sent yet
        self._end = 0  # characters that the tokens so far have
        self._raw = ""
        self._sent = ""
        self._start: int | None = None

    def take(self, logprobs: Sequence[TokenLogprob], raw: str, sent: str) -> tuple[TokenLogprob, ...]:
        """The log-probabilities that may be sent with the text `sent`.

        logprobs, raw: the tokens and the text that the guide committed. sent: what the cleaner made of it.
        """
        self._raw += raw
        self._sent += sent
        for each in logprobs:
            self._place(each)
        if self._start is None and self._sent:
            at = self._raw.find(self._sent)  # behind white space that a cleaner drops
            self._start = at if at >= 0 else sys.maxsize  # a cleaner that rewrites: no token is of its text
        start = self._start or 0
        upto = start + len(self._sent)
        ready = [
            replace(each, offset=begin - start, part=self._raw[begin:end])
            for begin, end, each in self._waiting
            if start <= begin < end <= upto
        ]
        self._waiting = [item for item in self._waiting if item[1] > upto or item[0] == item[1]]
        return tuple(ready)

    def _place(self, each: TokenLogprob) -> None:
        """Note which characters a token is of. Tokens that are parts of one character all have that character."""
        before = self._ids[-SPAN:]
        known = len(self._decoder.text(before))
        self._ids.append(each.token_id)
        end = self._end + len(self._decoder.text([*before, each.token_id])) - known
        begin = self._end
        self._waiting.append((begin, end, each))
        if end > begin:
            self._waiting = [(b, end if b == e else e, each) for b, e, each in self._waiting]
        self._end = end
