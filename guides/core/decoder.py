"""Text of an answer's tokens behind its prompt, by vLLM's rules, and which of the tokens a part of that text is.

Tokens are decoded together with the end of the prompt (some tokenizers drop a space that begins a text), and tokens
at the end that are only part of a character are not shown until the rest of it is there.
"""

from collections.abc import Sequence

from guiderail.guides.core.interfaces import Renderer
from guiderail.guides.core.types import TokenPrompt

CONTEXT = 8  # prompt tokens that are decoded before the answer
UNFINISHED = "\ufffd"  # what a decoder shows for part of a character


class Decoder:
    """Decodes the answers to one prompt."""

    def __init__(self, renderer: Renderer, prompt: TokenPrompt, *, skip_special_tokens: bool = True) -> None:
        self._renderer = renderer
        self._skip = skip_special_tokens
        self._tail = prompt.token_ids[-CONTEXT:]
        self._before = self._decode(self._tail)

    def text(self, ids: Sequence[int]) -> str:
        """Text of an answer's tokens."""
        text = self._decode((*self._tail, *ids))
        return text[len(self._before) :] if text.startswith(self._before) else self._decode(ids)

    def kept(self, ids: Sequence[int], length: int) -> int:
        """Number of leading tokens whose text ends within the first `length` characters of the answer's."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.text(ids[:middle])) <= length:
                low = middle
            else:
                high = middle - 1
        return low

    def _decode(self, ids: Sequence[int]) -> str:
        while (text := self._renderer.decode(ids, skip_special_tokens=self._skip)).endswith(UNFINISHED):
            ids = ids[:-1]
        return text
