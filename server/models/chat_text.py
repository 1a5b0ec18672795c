"""Conversations as a chat template writes them, with contents as text: no content makes, ends or begins a turn.

Which control tokens are the template's is told from a rendering without the contents. Where the rendering of the
conversation itself has others, the contents' are hidden from the template in characters without a meaning, and are text
afterwards. Whatever a template does with contents (it may trim them, show them twice, join them with its own text or
with each other), a control token is one only if the template wrote all of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from guiderail.server.models.control_tokens import DISGUISE, ControlTokens

Turn = tuple[str, str]  # role and content
CONTENT = chr(DISGUISE[-1])  # stands for a content where only its place matters
REMEMBERED_TURNS = 32


@dataclass(frozen=True, slots=True)
class Text:
    """A text for the tokenizer. marked: the control tokens in it are marks (ControlTokens.mark), all else is text."""

    text: str
    marked: bool


class ChatText:
    """A chat template and the control tokens of its tokenizer."""

    def __init__(
        self, tokenizer: Any, control: ControlTokens, check: Callable[[str], None] = lambda text: None
    ) -> None:
        """tokenizer: of transformers. check: called with what the template wrote; raises what is wrong with it."""
        self._tokenizer = tokenizer
        self._check = check
        self._control = control
        self._remembered = lru_cache(maxsize=1024)(self._found)

    def render(
        self, turns: Sequence[Turn], *, add_generation_prompt: bool = False, continue_final_message: bool = False
    ) -> Text:
        """Return the conversation as the template writes it. Raises what the template raises.

        Texts that contain no control tokens come out as the template alone writes them.
        """
        how = (add_generation_prompt, continue_final_message)
        contents = [content for _, content in turns]
        written, wanted = self.write(turns, *how), self._own(turns, *how)
        if self._control.find(written) == wanted and not any(map(self._control.find, contents)):
            return Text(written, marked=False)
        table = self._control.disguise(contents)
        hidden = self.write([(role, self._control.hide(content, table)) for role, content in turns], *how)
        if self._control.find(hidden) != wanted:  # one of several pieces, or made by the template of another text
            hidden = self.write([(role, content.translate(table)) for role, content in turns], *how)
        back = {code: character for character, code in table.items()}
        return Text(self._control.mark(hidden).translate(back), marked=True)

    def write(self, turns: Sequence[Turn], add_generation_prompt: bool, continue_final_message: bool) -> str:
        """Return what the template alone makes of the conversation, contents unchecked."""
        messages = [{"role": role, "content": content} for role, content in turns]
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        self._check(text)
        return text

    def _own(self, turns: Sequence[Turn], *how: bool) -> list[str] | None:
        """Return the control tokens that the template writes around such contents; None if it refuses others."""
        bare = tuple((role, CONTENT if content.strip() else content) for role, content in turns)
        usual = len(bare) <= REMEMBERED_TURNS and all(len(content) <= 1 for _, content in bare)
        return (self._remembered if usual else self._found)(bare, *how)

    def _found(self, turns: Sequence[Turn], *how: bool) -> list[str] | None:
        try:
            return self._control.find(self.write(turns, *how))
        except Exception:  # templates raise whatever they like
            return None
