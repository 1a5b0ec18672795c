"""Token ids of a conversation and an answer for a model: by its chat template, its tokenizer, in windows of its length.

Texts of users and models are content. What looks like one of the tokenizer's control tokens there is encoded as the
ordinary text that it is, so that no text can end its turn or begin another one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.types import PROMPT, Message

PRIVATE = range(0xF0000, 0xFFFFE)  # characters that no text has a meaning for: marks for content within a template


class TooLong(RequestError, ValueError):
    """A conversation is longer than its reward model reads."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text for the tokenizer in parts, `plain` where control tokens are content.

    ended: it ends with its turn. opens: it stands first, where a tokenizer without a template puts special tokens.
    """

    parts: tuple[tuple[str, bool], ...]
    ended: bool
    opens: bool = True


class ConversationEncoder:
    """Renders conversations and encodes them, for one tokenizer."""

    def __init__(self, tokenizer: Any, *, at_end_of_turn: bool = False) -> None:
        """at_end_of_turn: drop what a template puts behind the token that ends the answer's turn."""
        self._tokenizer = tokenizer
        self._at_end_of_turn = at_end_of_turn
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None

    def render(self, messages: Sequence[Message], answer: str, *, partial: bool) -> Rendered:
        """Render the conversation with an answer, which goes on with a last message of the assistant.

        Raises RequestError for a conversation that the chat template refuses. A system message that it has no place
        for stands before the first user message.
        """
        if messages and messages[0].role == PROMPT:
            if not self._tokenizer.chat_template:
                return Rendered(((messages[0].content + answer, True),), ended=False)
            mark = self._mark(answer)
            return Rendered(self._split(messages[0].content + self._marked(answer, mark), mark), ended=False)
        turns = [(m.role, m.content) for m in messages]
        begun = turns.pop()[1] if turns and turns[-1][0] == "assistant" else ""
        turns.append(("assistant", begun + answer))
        if not self._tokenizer.chat_template:
            return Rendered((("\n\n".join(content for _, content in turns), True),), ended=False)
        # An empty last turn cannot be continued in a template; it ends there as it would if it were whole.
        goes_on = partial and bool(turns[-1][1].strip())
        mark = self._mark(*(content for _, content in turns))
        text = self._template([(role, self._marked(content, mark)) for role, content in turns], goes_on)
        if self._at_end_of_turn and not goes_on:
            text = text.rstrip()
        return Rendered(self._split(text, mark), ended=not goes_on and self._at_end_of_turn)

    def divide(self, messages: Sequence[Message], answer: str, *, partial: bool) -> tuple[Rendered, Rendered]:
        """Render as `render` does, in two: what the answer goes on from, and the answer with what ends its turn.

        A language model reads the two one after the other, each in tokens of its own. Raises RequestError.
        """
        cut = _unused("".join((answer, *(m.content for m in messages))))
        whole = self.render(messages, cut + answer, partial=partial)
        found = [i for i, (text, _) in enumerate(whole.parts) if cut in text]
        if len(found) != 1 or whole.parts[found[0]][0].count(cut) != 1:
            raise RequestError("the model's chat template does not show the answer once", "messages")
        at = found[0]
        text, plain = whole.parts[at]
        before, after = text.split(cut)
        first = Rendered((*whole.parts[:at], (before, plain)), ended=False)
        return first, Rendered(((after, plain), *whole.parts[at + 1 :]), whole.ended, opens=False)

    def encode(self, texts: Sequence[Rendered]) -> list[list[int]]:
        """Return the token ids of each text."""
        kinds = [(t.parts[0][1], t.opens) if len(t.parts) == 1 else None for t in texts]  # most have one part
        found = {
            kind: iter(self._ids([t.parts[0][0] for t, each in zip(texts, kinds, strict=True) if each == kind], *kind))
            for kind in dict.fromkeys(kinds)
            if kind is not None
        }
        return [
            next(found[kind])
            if kind is not None
            else [
                token
                for i, (part, plain) in enumerate(text.parts)
                for token in self._ids([part], plain, text.opens and i == 0)[0]
            ]
            for text, kind in zip(texts, kinds, strict=True)
        ]

    def _ids(self, texts: list[str], plain: bool, opens: bool) -> list[list[int]]:
        add = opens and not self._tokenizer.chat_template
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=add, split_special_tokens=plain)["input_ids"]
        return ids

    def _template(self, turns: list[tuple[str, str]], goes_on: bool) -> str:
        try:
            return self._apply(turns, goes_on)
        except Exception as error:  # templates raise whatever they like
            user = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
            if turns[0][0] != "system" or user is None:
                raise _refused(error) from error
            (_, system), (_, asked) = turns[0], turns[user]
            folded = [*turns[1:user], ("user", f"{system}\n\n{asked}"), *turns[user + 1 :]]
            try:
                return self._apply(folded, goes_on)
            except Exception:
                raise _refused(error) from error

    def _apply(self, turns: Sequence[tuple[str, str]], goes_on: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=goes_on)
        return text

    def _mark(self, *contents: str) -> str:
        """Return a character that is in none of the contents; "" where they have no control tokens to mark."""
        if self._special is None or not any(self._special.search(content) for content in contents):
            return ""
        return _unused("".join(contents))

    def _marked(self, content: str, mark: str) -> str:
        if not mark or self._special is None:
            return content
        return self._special.sub(lambda found: f"{mark}{found[0]}{mark}", content)

    @staticmethod
    def _split(text: str, mark: str) -> tuple[tuple[str, bool], ...]:
        pieces = text.split(mark) if mark else [text]
        return tuple((piece, i % 2 == 1) for i, piece in enumerate(pieces) if piece) or (("", False),)


def _unused(text: str) -> str:
    """Return a character of no meaning that is not in the text."""
    used = set(text)
    return next(chr(code) for code in PRIVATE if chr(code) not in used)


def _refused(error: Exception) -> RequestError:
    return RequestError(f"the reward model's chat template refuses the conversation: {error}", "messages")


def windows(ids: list[int], size: int, *, end: bool) -> list[list[int]]:
    """Return all of a sequence in overlapping windows of at most `size` tokens, the last one first.

    A reward is read at a window's end, and what lies far before that says little there: the ends are a quarter of
    `size` apart, and the first windows are shorter, so that no token is far from the end of some window.
    end: the last token ends the answer's turn; every window gets it as its own last, as a reward is read there.
    """
    if len(ids) <= size:
        return [ids]
    body, closing, room = (ids[:-1], ids[-1:], size - 1) if end and size > 1 else (ids, [], size)
    step = max(1, size // 4)
    stops = range(len(body), step - 1, -step)
    return [[*body[max(0, stop - room) : stop], *closing] for stop in stops]
