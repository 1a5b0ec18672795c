"""Reward models as rewards: texts under the model's own chat template, scored by the packed runner.

One thread owns a model's runner, so scoring never runs on the event loop and calls of many requests are
scored one batch after another. Raw head values come out, without sigmoid or normalisation.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field

from guiderail.guides import base
from guiderail.guides.base import ScoreResult
from guiderail.guides.reward import Reward, Services
from guiderail.guides.types import PROMPT, Answer, Message, ScoreGroup
from guiderail.server.rewards.stats import RunnerStats


class Backend(Protocol):
    """What scores token sequences: the packed runner, a vLLM pooling engine here, or such servers elsewhere."""

    heads: int
    stats: RunnerStats

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """[S][heads] raw values after the last token of each sequence."""
        ...

    async def close(self) -> None: ...


class NeuralReward(Reward):
    """A reward model's raw value of the answer to the conversation (its own tokenizer and chat template)."""

    class Params(base.Params):
        heads: list[float] | None = Field(
            default=None, min_length=1, description="Weights of the model's heads; default: the operator's choice."
        )
        steps: str | None = Field(
            default=None, min_length=1, description="Process reward: also read a value after each of these marks."
        )
        aggregate: Literal["min", "mean", "last", "sum"] = Field(
            default="min", description="How the values at `steps` become one."
        )

    batched: ClassVar[bool] = True

    def __init__(
        self,
        load: Callable[[], Awaitable["tuple[Backend, Any, int | None]"]],
        head: int = 0,
        *,
        at_end_of_turn: bool = False,
        last_tokens: int | None = None,
        identity: Callable[[], str] | None = None,
    ) -> None:
        """`load` returns the backend, the tokenizer and the longest input (None: no limit).

        at_end_of_turn: score at the token that ends the answer's turn, where reward heads are trained, and
        not after what a template puts behind it (ChatML: a line break), where sequence classifiers are.
        last_tokens: score only so many tokens at the end of a conversation, as the model was trained to; without
        it a conversation longer than the model reads is an error.
        identity: tells the weights apart from others, once they are loaded.
        """
        self._identity = identity
        self._load = load
        self._at_end_of_turn = at_end_of_turn
        self._last_tokens = last_tokens
        self._head = head
        self._backend: Backend | None = None
        self._tokenizer: Any = None
        self._longest: int | None = None

    async def start(self, services: Services) -> None:
        backend, self._tokenizer, self._longest = await self._load()
        self._backend = backend
        if not 0 <= self._head < backend.heads:
            raise ValueError(f"head={self._head}, but the model has heads 0 to {backend.heads - 1}")

    @property
    def stats(self) -> RunnerStats | None:
        """Counts of the backend, once it is loaded."""
        return self._backend.stats if self._backend is not None else None

    def check(self, params: Any, services: Services) -> None:
        if params.heads is not None and self._backend is not None and len(params.heads) != self._backend.heads:
            raise ValueError(f"'heads' has {len(params.heads)} weights; the model has {self._backend.heads} heads")

    def revision(self) -> str:
        weights = self._identity() if self._identity is not None else super().revision()
        return f"{weights}-head{self._head}"

    async def close(self) -> None:
        """Frees the model."""
        if self._backend is not None:
            await self._backend.close()

    async def score(self, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
        assert self._backend is not None
        texts = [self._texts(group, answer) for group in groups for answer in group.answers]
        ids = await asyncio.to_thread(self._encode, [text for part in texts for text in part])
        values = iter(await self._backend.score(ids))
        lengths = iter(len(each) for each in ids)
        results, parts = [], iter(texts)
        for group in groups:
            scored, tokens = [], 0
            for _ in group.answers:
                steps = []
                for _ in next(parts):
                    steps.append(self._mix(next(values), group.params))
                    tokens += next(lengths)
                scored.append(_aggregate(steps, group.params.aggregate) if group.params.steps else steps[-1])
            results.append(ScoreResult(tuple(scored), tokens))
        return results

    def _mix(self, heads: Sequence[float], params: Any) -> float:
        if params.heads is None:
            return heads[self._head]
        return math.fsum(weight * value for weight, value in zip(params.heads, heads, strict=True))

    def _texts(self, group: ScoreGroup, answer: Answer) -> list[str]:
        """What to score for one answer: with steps every marked part of it, and last the whole answer."""
        whole = self._render(group.messages, answer.text, partial=answer.partial)
        if group.params.steps is None:
            return [whole]
        pieces = answer.text.split(group.params.steps)
        ends = [group.params.steps.join(pieces[: i + 1]) + group.params.steps for i in range(len(pieces) - 1)]
        return [*(self._render(group.messages, text, partial=True) for text in ends), whole]

    def _render(self, messages: Sequence[Message], answer: str, *, partial: bool) -> str:
        if messages and messages[0].role == PROMPT:
            return messages[0].content + answer
        turns = [{"role": m.role, "content": m.content} for m in messages]
        if turns and turns[-1]["role"] == "assistant":  # the answer continues this turn
            turns[-1] = {"role": "assistant", "content": turns[-1]["content"] + answer}
        else:
            turns.append({"role": "assistant", "content": answer})
        if not self._tokenizer.chat_template:
            return "\n\n".join(turn["content"] for turn in turns)
        # An empty last turn cannot be continued in a template; it ends there as it would if it were whole.
        goes_on = partial and bool(turns[-1]["content"].strip())
        text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=goes_on)
        return text.rstrip() if self._at_end_of_turn and not goes_on else text

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=not self._tokenizer.chat_template)["input_ids"]
        if self._last_tokens is not None:
            ids = [each[-self._last_tokens :] for each in ids]
        for each in ids:
            if self._longest is not None and len(each) > self._longest:
                raise ValueError(f"conversation and answer have {len(each)} tokens; the model reads {self._longest}")
        return ids


def _aggregate(values: Sequence[float], how: str) -> float:
    match how:
        case "min":
            return min(values)
        case "mean":
            return sum(values) / len(values)
        case "sum":
            return sum(values)
    return values[-1]


@cache
def scoring_thread() -> ThreadPoolExecutor:
    """The one thread of this process that runs torch, for all reward models, their loading included.

    GNU OpenMP keeps a pool of workers for each thread that ever ran a parallel region. As soon as there are
    more of them than cores it stops spinning at barriers, which makes scoring a third slower on two cores.
    Its priority is the engine's: at a lower one it starved while idle vLLM processes polled for work.
    """
    return ThreadPoolExecutor(1, "guiderail-reward")


class PackedBackend:
    """Backend over a PackedRunner, which the scoring thread owns."""

    def __init__(self, runner: Any, heads: int) -> None:
        self._runner = runner
        self.heads = heads
        self.stats: RunnerStats = runner.stats

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        loop = asyncio.get_running_loop()
        values: list[list[float]] = await loop.run_in_executor(
            scoring_thread(), lambda: self._runner.score(sequences).tolist()
        )
        return values

    async def close(self) -> None:
        self._runner = None
