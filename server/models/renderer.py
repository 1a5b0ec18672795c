"""Conversion of text to token ids and back: the model's tokenizer and chat template. Knows no engine.

Messages are text: what looks like a control token in them is encoded as the text that it is (chat_text.py).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from guiderail.guides.core.errors import RequestError, TooLong
from guiderail.guides.core.types import Message, TokenPrompt
from guiderail.server.models.chat_text import ChatText, Text
from guiderail.server.models.control_tokens import ControlTokens
from guiderail.server.models.token_bytes import token_bytes
from guiderail.server.models.token_spelling import TokenSpelling


class ChatRenderer:
    """Renders messages with the chat template that comes with the model, or with the operator's own."""

    def __init__(
        self,
        model: str,
        chat_template: str | None = None,
        *,
        allow_control_tokens: bool = False,
        plain_completions: bool = False,
        context: Callable[[], int] = lambda: 0,
    ) -> None:
        """`chat_template` is a Jinja template or the path of one. Raises OSError for an unknown model,
        GuiderailError for a tokenizer that cannot tell text from control tokens.

        allow_control_tokens: what looks like a control token in messages is one. plain_completions: in the prompts of
        text completions it is not. context: the most tokens that the model reads, 0 while that is not known.
        """
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        if chat_template is not None:
            path = Path(chat_template)
            is_file = "{" not in chat_template and path.is_file()
            self._tokenizer.chat_template = path.read_text() if is_file else chat_template
        self._control = ControlTokens(self._tokenizer)
        self._chat = ChatText(self._tokenizer, self._control, partial(self._check_length, "messages"))
        self._context = context
        self._bound = token_bytes(self._tokenizer.backend_tokenizer.to_str())
        self._allow_control_tokens, self._plain_completions = allow_control_tokens, plain_completions
        self.token_bytes = lru_cache(maxsize=65536)(TokenSpelling(self._tokenizer.backend_tokenizer).of)
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    @property
    def has_chat_template(self) -> bool:
        """False for most base models, to which chat requests are refused."""
        return bool(self._tokenizer.chat_template)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens with which the model ends an answer."""
        end = self._tokenizer.eos_token_id
        return frozenset() if end is None else frozenset({int(end)})

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> TokenPrompt:
        """Return the token ids of a conversation. Raises RequestError if the template refuses it."""
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template (it is a base model): use alignment.prompter urial, /v1/completions, "
                "or a server started with --chat-template",
                "messages",
            )
        turns = [(m.role, m.content) for m in messages]
        try:
            if self._allow_control_tokens:
                written = self._chat.write(turns, add_generation_prompt, continue_final_message)
                text = Text(written, marked=False)
            else:
                text = self._chat.render(
                    turns, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
                )
        except RequestError:
            raise
        except Exception as error:  # templates raise whatever they like
            raise RequestError(f"the model's chat template refuses these messages: {error}", "messages") from error
        return TokenPrompt(tuple(self._control.encode([text.text], marked=text.marked)[0]))

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]:
        """Return the token ids of raw text; with `add_special_tokens` as a prompt's start (BOS if the model has one).

        plain: treat what looks like a control token as ordinary text.
        """
        return self._control.encode([text], marked=plain, add_special_tokens=add_special_tokens)[0]

    def encode_prompt(self, text: str, *, opens: bool = True) -> list[int]:
        """Return the token ids of a text completion's prompt; control tokens in it count, unless the operator says no.

        opens: nothing stands before it.
        """
        self._check_length("prompt", text)
        return self.encode(text, add_special_tokens=opens, plain=self._plain_completions)

    def _check_length(self, field: str, text: str) -> None:
        """Raise TooLong for a text of which the number of bytes alone says that the model cannot read it."""
        context, bound = self._context(), self._bound
        if not context or bound is None or len(text) * 4 <= context * bound.longest:
            return
        if (least := bound.least(text)) > context:
            raise TooLong(f"the prompt has at least {least} tokens; the model's context is {context}", field)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of a token sequence, by default without special tokens."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _token_text(self, token_id: int) -> str:
        """Return the text of one token alone (part of a multi-byte character shows as a replacement character)."""
        if (known := self.token_bytes(token_id)) is not None:
            return known.decode(errors="replace")
        text: str = self._tokenizer.decode([token_id])
        return text
