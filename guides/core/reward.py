"""What a reward is: a batch of answer groups in, one raw value per answer out.

Values are raw, without a hidden sigmoid or normalisation. Most rewards need no more than a `TextReward`:

    class Exclamations(TextReward):
        '''Counts exclamation marks.'''

        def score_text(self, prompt: str, answer: str, params: Params) -> float:
            return float(answer.count("!"))
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from guiderail.guides.core.guide import Engine, Params, ScoreResult
from guiderail.guides.core.types import PROMPT, Message, ScoreGroup, TokenPrompt


class Renderer(Protocol):
    """Turns messages into a prompt for the served model, and token ids into text."""

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> TokenPrompt: ...

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What a reward may use of the server: the engine, its renderer, the names of its model and LoRA adapters.

    remote: names of policies on other servers, which can be rolled out and nothing else.
    """

    engine: Engine
    renderer: Renderer
    adapters: frozenset[str] = frozenset()
    model_name: str = ""
    remote: frozenset[str] = frozenset()


class Reward(ABC):
    """A reward function or model. The docstring's first line is its public description.

    batched: whether the Scorer collects groups of many requests into one call of `score`. A reward that
    asks the engine has no use for that (the engine batches) and is called once for each group.
    """

    Params: ClassVar[type[Params]] = Params
    batched: ClassVar[bool] = True

    async def start(self, services: Services) -> None:
        """Loads what the reward needs. Called once before serving; raising stops the server's start."""
        return

    def check(self, params: Any, services: Services) -> None:
        """Refuses parameters that are well-formed but cannot work here, by raising ValueError."""
        return

    def revision(self) -> str:
        """Identifies what computes the values: change it when they change, so that stored calibrations are refused."""
        return "1"

    async def close(self) -> None:
        """Frees what `start` made. Called once, at the server's end."""
        return

    @abstractmethod
    async def score(self, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
        """Raw finite values: one result per group, one value per answer. Raising fails the request."""
        ...


class TextReward(Reward):
    """A reward of the answer's text alone, computed off the event loop.

    The text is the whole answer: what a last message of the assistant began, and the model's continuation of it.
    """

    @abstractmethod
    def score_text(self, prompt: str, answer: str, params: Any) -> float:
        """Value of one answer to `prompt`, the text of the last user message (or the raw prompt)."""
        ...

    async def score(self, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
        return await asyncio.to_thread(self._score, groups)

    def _score(self, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
        return [
            ScoreResult(
                tuple(self.score_text(prompt_text(group.messages), text, group.params) for text in answer_texts(group))
            )
            for group in groups
        ]


def begun(messages: Sequence[Message]) -> str:
    """The beginning of the answer that the conversation ends with: a last message of the assistant, else ""."""
    return messages[-1].content if messages and messages[-1].role == "assistant" else ""


def answer_texts(group: ScoreGroup) -> list[str]:
    """The answers as their reader has them: with their beginning, where the conversation ends with it."""
    start = begun(group.messages)
    return [start + answer.text for answer in group.answers]


def instructions(messages: Sequence[Message]) -> str:
    """What the answer was given under: the system messages, with an empty line between."""
    return "\n\n".join(m.content for m in messages if m.role == "system")


def prompt_text(messages: Sequence[Message]) -> str:
    """What the answer answers: the last user message, or a text completion's prompt; "" if there is neither."""
    return next((m.content for m in reversed(messages) if m.role in ("user", PROMPT)), "")
