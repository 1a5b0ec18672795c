"""Token ids of a conversation and an answer for a model: by its chat template, its tokenizer, in windows of its length.

Texts of users and models are content: what looks like a control token in them is encoded as the ordinary text that it
is (server/models/chat_text.py), so that no text can end its turn or begin another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.types import PROMPT, Answer, Message
from guiderail.server.models.chat_text import ChatText, Text, Turn
from guiderail.server.models.control_tokens import DISGUISE, ControlTokens

TEMPLATE_TOKENS, OPENING = 32, 256  # more than a template writes around a message, and before the first and the last


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text for the tokenizer.

    ended: it ends with its turn. opens: it stands first, where a tokenizer without a template puts special tokens.
    """

    text: Text
    ended: bool
    opens: bool = True


class ConversationEncoder:
    """Renders conversations and encodes them, for one tokenizer."""

    def __init__(self, tokenizer: Any, *, at_end_of_turn: bool = False, plain_completions: bool = False) -> None:
        """at_end_of_turn: drop what a template puts behind the token that ends the answer's turn. plain_completions:
        what looks like a control token in the prompt of a text completion is none. Raises GuiderailError for a
        tokenizer that cannot tell text from control tokens.
        """
        self._has_template = bool(tokenizer.chat_template)
        self._at_end_of_turn = at_end_of_turn
        self._plain_completions = plain_completions
        self._control = ControlTokens(tokenizer)
        self._chat = ChatText(tokenizer, self._control)

    def render(self, messages: Sequence[Message], answer: str, *, partial: bool) -> Rendered:
        """Render the conversation with an answer, which goes on with a last message of the assistant.

        Raises RequestError for a conversation that the chat template refuses. A system message that it has no place
        for stands before the first user message.
        """
        if messages and messages[0].role == PROMPT:
            return Rendered(self._completed(messages[0].content, answer), ended=False)
        turns = [(m.role, m.content) for m in messages]
        begun = turns.pop()[1] if turns and turns[-1][0] == "assistant" else ""
        turns.append(("assistant", begun + answer))
        if not self._has_template:
            return Rendered(Text("\n\n".join(content for _, content in turns), marked=True), ended=False)
        # An empty last turn cannot be continued in a template; it ends there as it would if it were whole.
        goes_on = partial and bool(turns[-1][1].strip())
        text = self._template(turns, goes_on)
        if self._at_end_of_turn and not goes_on:
            text = Text(text.text.rstrip(), text.marked)
        return Rendered(text, ended=not goes_on and self._at_end_of_turn)

    def divide(self, messages: Sequence[Message], answer: str, *, partial: bool) -> tuple[Rendered, Rendered]:
        """Render as `render` does, in two: what the answer goes on from, and the answer with what ends its turn.

        A language model reads the two one after the other, each in tokens of its own. Raises RequestError.
        """
        cut = _unused("".join((answer, *(m.content for m in messages))))
        whole = self.render(messages, cut + answer, partial=partial)
        if whole.text.text.count(cut) != 1:
            raise RequestError("the model's chat template does not show the answer once", "messages")
        before, after = whole.text.text.split(cut)
        first = Rendered(Text(before, whole.text.marked), ended=False)
        return first, Rendered(Text(after, whole.text.marked), whole.ended, opens=False)

    def encode(self, texts: Sequence[Rendered]) -> list[list[int]]:
        """Return the token ids of each text."""
        kinds = [(each.text.marked, each.opens and not self._has_template) for each in texts]
        found = {
            kind: iter(
                self._control.encode(
                    [each.text.text for each, other in zip(texts, kinds, strict=True) if other == kind],
                    marked=kind[0],
                    add_special_tokens=kind[1],
                )
            )
            for kind in dict.fromkeys(kinds)
        }
        return [next(found[kind]) for kind in kinds]

    def _completed(self, prompt: str, answer: str) -> Text:
        """Return a text completion's prompt with its answer: the former is its writer's, the latter is text."""
        if self._plain_completions or not self._has_template:
            return Text(prompt + answer, marked=True)
        if not self._control.find(answer) and self._control.find(prompt + answer) == self._control.find(prompt):
            return Text(prompt + answer, marked=False)
        return Text(self._control.mark(prompt) + answer, marked=True)

    def _template(self, turns: list[Turn], goes_on: bool) -> Text:
        try:
            return self._chat.render(turns, continue_final_message=goes_on)
        except Exception as error:  # templates raise whatever they like
            user = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
            if turns[0][0] != "system" or user is None:
                raise _refused(error) from error
            (_, system), (_, asked) = turns[0], turns[user]
            folded = [*turns[1:user], ("user", f"{system}\n\n{asked}"), *turns[user + 1 :]]
            try:
                return self._chat.render(folded, continue_final_message=goes_on)
            except Exception:
                raise _refused(error) from error


def surely_fits(messages: Sequence[Message], answers: Sequence[Answer], limit: int) -> bool:
    """Return True where a conversation with any of the answers has at most `limit` tokens whatever its tokenizer is.

    A token has at least one byte, and templates write little around a message.
    """
    sizes = [len(m.content.encode(errors="replace")) + TEMPLATE_TOKENS for m in messages]
    return sum(sizes) + max((len(a.text.encode(errors="replace")) for a in answers), default=0) + OPENING <= limit


def _unused(text: str) -> str:
    """Return a character of no meaning that is not in the text. Raises RequestError if there is none."""
    used = set(text)
    for code in reversed(DISGUISE):
        if chr(code) not in used:
            return chr(code)
    raise RequestError("the messages have all characters of Unicode's first private use plane", "messages")


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
