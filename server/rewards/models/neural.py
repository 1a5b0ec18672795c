"""Reward models as rewards: texts under the model's own chat template, scored by a backend.

A model's backend owns a thread or a process, so scoring never runs on the event loop and calls of many requests
are scored one batch after another. Raw head values come out, without sigmoid or normalisation.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from guiderail.guides.core.errors import TooLong
from guiderail.guides.core.interfaces import ScoreResult, Services
from guiderail.guides.core.reward import begun
from guiderail.guides.core.types import LARGEST_FACTOR, Answer, Params, ScoreGroup
from guiderail.server.engines.engine_stats import RunnerStats
from guiderail.server.rewards.models.backend import Backend, ModelReward
from guiderail.server.rewards.models.conversation_tokens import ConversationEncoder, Rendered, surely_fits, windows


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """A running model, its template and tokenizer, and the tokens of the longest input (None: no limit)."""

    backend: Backend
    conversations: ConversationEncoder
    longest: int | None


HeadWeight = Annotated[float, Field(ge=-LARGEST_FACTOR, le=LARGEST_FACTOR)]


class NeuralRewardParams(Params):
    heads: list[HeadWeight] | None = Field(
        default=None, min_length=1, description="Weights of the model's heads; default: the operator's choice."
    )
    steps: str | None = Field(
        default=None, min_length=1, description="Process reward: also read a value after each of these marks."
    )
    aggregate: Literal["min", "mean", "last", "sum"] = Field(
        default="min", description="How the values at `steps` become one."
    )
    long: Literal["last", "worst", "refuse"] | None = Field(
        default=None,
        description="A conversation longer than the model reads: score its last tokens, or the worst of all its "
        "windows, or refuse it; default: last for a head that was trained on cut ones, else refuse.",
    )


class NeuralReward(ModelReward[NeuralRewardParams]):
    """A reward model's raw value of the answer to the conversation (its own tokenizer and chat template)."""

    Params = NeuralRewardParams

    batched: ClassVar[bool] = True

    def __init__(
        self,
        load: Callable[[], Awaitable[LoadedReward]],
        head: int = 0,
        *,
        last_tokens: int | None = None,
        identity: Callable[[], str] | None = None,
    ) -> None:
        """`load` is called once, by `start`.

        last_tokens: the model was trained on so many tokens at the end of a conversation; longer ones are cut to them
        unless the request says otherwise (`long`), and without it refused where they are longer than the model reads.
        identity: tells the weights apart from others, once they are loaded.
        """
        self._identity = identity
        self._load = load
        self._last_tokens = last_tokens
        self._head = head
        self._backend: Backend | None = None
        self._conversations: ConversationEncoder | None = None
        self._longest: int | None = None

    async def start(self, services: Services) -> None:
        loaded = await self._load()
        self._conversations, self._longest = loaded.conversations, loaded.longest
        self._backend = loaded.backend
        if not 0 <= self._head < loaded.backend.heads:
            raise ValueError(f"head={self._head}, but the model has heads 0 to {loaded.backend.heads - 1}")

    @property
    def stats(self) -> RunnerStats | None:
        """Counts of the backend, once it is loaded."""
        return self._backend.stats if self._backend is not None else None

    @property
    def up(self) -> bool:
        return self._backend is not None and self._backend.up

    def check(self, params: NeuralRewardParams, services: Services) -> None:
        if params.heads is not None and self._backend is not None and len(params.heads) != self._backend.heads:
            raise ValueError(f"'heads' has {len(params.heads)} weights; the model has {self._backend.heads} heads")

    def room(self, group: ScoreGroup[NeuralRewardParams]) -> int | None:
        """Any, in tokens that are not the model's. Raises TooLong for what is longer than it reads already."""
        limit = self._limit()
        if (
            limit is None
            or self._rule(group.params.long) != "refuse"
            or surely_fits(group.messages, group.answers, limit)
        ):
            return None
        answers = group.answers or (Answer("", partial=True),)
        self._encode([(self._texts(group, answer)[-1], group.params.long) for answer in answers])
        return None

    def revision(self) -> str:
        weights = self._identity() if self._identity is not None else super().revision()
        return f"{weights}-head{self._head}"

    async def close(self) -> None:
        """Free the model."""
        if self._backend is not None:
            await self._backend.close()

    async def score(self, groups: Sequence[ScoreGroup[NeuralRewardParams]]) -> list[ScoreResult]:
        """Raises RequestError for a conversation that the model's template refuses or that is longer than it reads."""
        assert self._backend is not None
        texts = [[self._texts(group, answer) for answer in group.answers] for group in groups]
        flat = [
            (text, group.params.long) for group, part in zip(groups, texts, strict=True) for s in part for text in s
        ]
        found = await asyncio.to_thread(self._encode, flat)
        values = iter(await self._backend.score([window for each, _ in found for window in each]))
        encoded, results = iter(found), []
        for group, part in zip(groups, texts, strict=True):
            scored, tokens, warnings = [], 0, set()
            for steps in part:
                read = []
                for _ in steps:
                    parts, warning = next(encoded)
                    read.append(min(self._mix(next(values), group.params) for _ in parts))
                    tokens += sum(map(len, parts))
                    warnings.add(warning)
                scored.append(_aggregate(read, group.params.aggregate) if group.params.steps else read[-1])
            results.append(ScoreResult(tuple(scored), tokens, tuple(sorted(warnings - {""}))))
        return results

    def _mix(self, heads: Sequence[float], params: NeuralRewardParams) -> float:
        if params.heads is None:
            return heads[self._head]
        return math.fsum(weight * value for weight, value in zip(params.heads, heads, strict=True))

    def _texts(self, group: ScoreGroup[NeuralRewardParams], answer: Answer) -> list[Rendered]:
        """Return the texts to score for one answer: with steps every marked part of it, and last the whole answer."""
        assert self._conversations is not None
        render, mark = self._conversations.render, group.params.steps
        whole = render(group.messages, answer.text, partial=answer.partial)
        if mark is None:
            return [whole]
        start = begun(group.messages)
        before = group.messages[:-1] if start else group.messages
        pieces = (start + answer.text).split(mark)
        ends = [mark.join(pieces[: i + 1]) + mark for i in range(len(pieces) - 1)]
        return [*(render(before, text, partial=True) for text in ends), whole]

    def _encode(self, texts: Sequence[tuple[Rendered, str | None]]) -> list[tuple[list[list[int]], str]]:
        """Return the windows to score of each text, whose `long` stands beside it, and a warning or ""."""
        assert self._conversations is not None
        encoded = self._conversations.encode([text for text, _ in texts])
        return [self._windows(ids, text.ended, long) for ids, (text, long) in zip(encoded, texts, strict=True)]

    def _limit(self) -> int | None:
        return min((each for each in (self._last_tokens, self._longest) if each is not None), default=None)

    def _rule(self, long: str | None) -> str:
        return long or ("refuse" if self._last_tokens is None else "last")

    def _windows(self, ids: list[int], ended: bool, long: str | None) -> tuple[list[list[int]], str]:
        limit = self._limit()
        if limit is None or len(ids) <= limit:
            return [ids], ""
        match self._rule(long):
            case "worst":
                return windows(ids, limit, end=ended), ""
            case "last":
                return [ids[-limit:]], (
                    f"a conversation with its answer is longer than the {limit} tokens that the model reads, so only "
                    "its last ones were scored; 'long' of the reward may be 'worst' (all windows) or 'refuse'"
                )
        raise TooLong(
            f"conversation and answer have {len(ids)} tokens; the model reads {limit}; 'long' of the reward may be "
            "'last' (its last tokens) or 'worst' (all windows)",
            "messages",
        )


def _aggregate(values: Sequence[float], how: str) -> float:
    match how:
        case "min":
            return min(values)
        case "mean":
            return sum(values) / len(values)
        case "sum":
            return sum(values)
    return values[-1]
