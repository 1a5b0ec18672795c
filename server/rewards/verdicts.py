"""A verdict of the served model between two words, read from the log-probabilities of its reply's first token.

It costs a prompt for each word and no generation. Texts stand in the prompt as quotes, so that nothing in them can look
like a part of it: each line begins with "> ", and what could be a special token of some tokenizer is broken up.
"""

import asyncio
import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice

from guiderail.guides.core.errors import TooLong
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.types import Message, TokenPrompt

# <|im_end|>, </s>, <start_of_turn>, [INST], [CLS]: a space after the bracket makes ordinary text of them.
_SPECIAL = re.compile(r"(?<=<)(?=[^\s<>]+>)|(?<=\[)(?=/?[A-Z_]+\])")


def quoted(text: str) -> str:
    """Return the text as a quote, line by line."""
    return "\n".join("> " + _SPECIAL.sub(" ", line) for line in text.splitlines() or [""])


AT_ONCE = 64  # questions that are put into prompts together, in a thread: thousands need never be there at a time


class Verdicts:
    """Asks the served model for one of two words."""

    def __init__(self, services: Services, words: tuple[str, str], refusal: str) -> None:
        """Raises ValueError with `refusal` if the tokenizer cannot tell the first tokens of the words apart."""
        self._services = services
        # After a template's generation prompt the reply starts at once, after "Reply:" with a space.
        space = "" if services.renderer.has_chat_template else " "
        first, second = (services.renderer.encode(space + word)[0] for word in words)
        if first == second:
            raise ValueError(refusal)
        self._tokens = ((first,), (second,))

    async def ask(self, texts: Iterable[str], adapter: str | None = None) -> tuple[list[float], int]:
        """Return for each question the probability of the first word against the second, as the served model, or an
        adapter of it, has it; and the tokens of all prompts. Raises as the engine and the chat template do.

        The questions are taken from `texts` in another thread, a few at a time.
        """
        found: list[float] = []
        tokens, left = 0, iter(texts)
        while prompts := await asyncio.to_thread(self._prompts, left, adapter):
            tokens += sum(len(prompt.token_ids) for prompt in prompts)
            rows = await self._services.engine.answer_logprobs(
                [prompt for prompt in prompts for _ in self._tokens], self._tokens * len(prompts)
            )
            found += (probability_of_first(one[0], other[0]) for one, other in zip(rows[::2], rows[1::2], strict=True))
        return found, tokens

    def _prompts(self, left: Iterator[str], adapter: str | None) -> list[TokenPrompt]:
        """Return the prompts of the next AT_ONCE questions. Raises TooLong."""
        prompts = [self._prompt(text, adapter) for text in islice(left, AT_ONCE)]
        if context := self._services.context():
            for prompt in prompts:
                self._fit(prompt, context)
        return prompts

    def _prompt(self, text: str, adapter: str | None) -> TokenPrompt:
        renderer = self._services.renderer
        if renderer.has_chat_template:
            return TokenPrompt(renderer.render([Message("user", text)]).token_ids, adapter)
        return TokenPrompt(tuple(renderer.encode(text + "\nReply:", add_special_tokens=True, plain=True)), adapter)

    def room(self, text: str) -> int | None:
        """Return the tokens that the context has left for more text in the question; None while it is not known.

        Raises TooLong if the question is too long as it is.
        """
        if not (context := self._services.context()):
            return None
        return context - 1 - self._fit(self._prompt(text, None), context)

    @staticmethod
    def _fit(prompt: TokenPrompt, context: int) -> int:
        """Return the prompt's number of tokens. Raises TooLong if that leaves none of the context."""
        if (length := len(prompt.token_ids)) >= context:
            raise TooLong(
                f"what the judge is asked, with the texts in it, has {length} tokens; it may have {context - 1}: the "
                f"model's context is {context}",
                "messages",
            )
        return length


def probability_of_first(first: float, second: float) -> float:
    """Return exp(first) / (exp(first) + exp(second)) without underflow."""
    return 1.0 / (1.0 + math.exp(min(second - first, 700.0)))
