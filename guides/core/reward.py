"""Rewards: a batch of answer groups in, one raw value per answer out.

Values are raw, without a hidden sigmoid or normalisation. Most rewards need no more than a `TextReward`:

    class Exclamations(TextReward):
        '''Counts exclamation marks.'''

        def score_text(self, prompt: str, answer: str, params: Params) -> float:
            return float(answer.count("!"))
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from typing import ClassVar, Generic

from guiderail.guides.core.interfaces import Renderer, ScoreResult, Services
from guiderail.guides.core.tasks import Threads
from guiderail.guides.core.types import PROMPT, Message, P_co, Params, ScoreGroup, TokenPrompt


class Reward(ABC, Generic[P_co]):
    """A reward function or model. The docstring's first line is its public description.

    Params: the class of its parameters, a subclass of Params, and the type that a Reward[ThatClass] is given.
    batched: whether the Scorer collects groups of many requests into one call of `score`. A reward that
    asks the engine has no use for that (the engine batches) and is called once for each group.
    asks_engine: whether an answer's score takes a sequence of the engine.
    """

    Params: ClassVar[type[Params]] = Params
    batched: ClassVar[bool] = True
    asks_engine: ClassVar[bool] = False

    async def start(self, services: Services) -> None:
        """Load what the reward needs. Called once before serving; raising stops the server's start."""
        return

    @property
    def up(self) -> bool:
        """False once it can score no more; the server then says that it is not ready."""
        return True

    def check(self, params: P_co, services: Services) -> None:  # type: ignore[misc]  # none but its own are given
        """Refuse parameters that are well-formed but cannot work here, by raising ValueError."""
        return

    async def vet(self, params: P_co, owner: str = "") -> None:  # type: ignore[misc]  # as in check
        """Refuse parameters as `check` does, where finding out takes long. Once for a request, before it starts.

        owner: tells clients apart, for fairness.
        """
        return

    def room(self, group: ScoreGroup[P_co]) -> int | None:
        """Tokens that an answer may have if the reward is to read it behind the group's conversation; None: any number.

        Asked before any work, with the answers that are known. Raises RequestError (TooLong) if the conversation, or
        one of them behind it, is too long as it is.
        """
        return None

    def revision(self) -> str:
        """Identity of what computes the values: change it when they change, so that stored calibrations are refused."""
        return "1"

    async def close(self) -> None:
        """Free what `start` made. Called once, at the server's end."""
        return

    @abstractmethod
    async def score(self, groups: Sequence[ScoreGroup[P_co]]) -> list[ScoreResult]:
        """Raw finite values: one result per group, one value per answer. Raising fails the request."""
        ...


class TextReward(Reward[P_co]):
    """A reward of the answer's text alone, computed off the event loop.

    The text is the whole answer: what a last message of the assistant began, and the model's continuation of it.
    """

    @abstractmethod
    def score_text(self, prompt: str, answer: str, params: P_co) -> float:  # type: ignore[misc]  # as in check
        """Value of one answer to `prompt`, the text of the last user message (or the raw prompt)."""
        ...

    async def score(self, groups: Sequence[ScoreGroup[P_co]]) -> list[ScoreResult]:
        return await self._threads.run(partial(self._score, groups))

    @cached_property
    def _threads(self) -> Threads:
        """Threads of its own: one that never returns is waited for by nobody else."""
        return Threads()

    def _score(self, groups: Sequence[ScoreGroup[P_co]]) -> list[ScoreResult]:
        return [
            ScoreResult(
                tuple(self.score_text(prompt_text(group.messages), text, group.params) for text in answer_texts(group))
            )
            for group in groups
        ]


def begun(messages: Sequence[Message]) -> str:
    """The beginning of the answer that the conversation ends with: a last message of the assistant, else ""."""
    return messages[-1].content if messages and messages[-1].role == "assistant" else ""


def next_turn(renderer: Renderer, messages: Sequence[Message]) -> TokenPrompt:
    """Render messages for their answer: go on with a last message of the assistant, or else open its turn."""
    goes_on = messages[-1].role == "assistant"
    return renderer.render(messages, add_generation_prompt=not goes_on, continue_final_message=goes_on)


def answer_texts(group: ScoreGroup) -> list[str]:
    """The answers as their reader has them: with their beginning, where the conversation ends with it."""
    start = begun(group.messages)
    return [start + answer.text for answer in group.answers]


def instructions(messages: Sequence[Message]) -> str:
    """Instructions that the answer was given under: the system messages, with an empty line between."""
    return "\n\n".join(m.content for m in messages if m.role == "system")


def prompt_text(messages: Sequence[Message]) -> str:
    """The question that is answered: the last user message, or a text completion's prompt; "" if there is neither."""
    return next((m.content for m in reversed(messages) if m.role in ("user", PROMPT)), "")
