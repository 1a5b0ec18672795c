"""Answers decoded by several policies in lockstep: one engine row for each policy, every row emitting every token.

Inside the engine a logits processor (vllm_mixing.py) sees the rows of a group side by side, draws one token from
their mixture and makes every row emit it. A row that is not in step (its partners are missing from the batch, or at
another place of the answer) emits a token that no partner emits there. So a token is taken for the answer only when
all rows of the group emitted it; at the first that differs the group is ended and begun again, replaying what was
taken. Noise is drawn by seed and place in the answer: the new group goes on as the old one would have.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from guiderail.guides.core.errors import EngineUnavailable, RequestError
from guiderail.guides.core.types import Delta, Mixed, SamplingSpec, TokenPrompt

MIX = "guiderail_mix"  # key of SamplingParams.extra_args
TRIES = 8


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the logits processor must know of a row. All after `replay` is given for role 0, the prompt's own policy.

    replay: tokens that the row emits first, whatever its logits say. weights: of roles 1, 2, ...
    """

    group: str
    role: int
    size: int
    replay: Sequence[int] = ()
    weights: Sequence[float] = ()
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    plausibility: float = 0.0

    def extra_args(self) -> dict[str, Any]:
        """For SamplingParams."""
        return {MIX: asdict(self) | {"replay": list(self.replay), "weights": list(self.weights)}}

    @staticmethod
    def of(extra_args: Mapping[str, Any] | None) -> "Recipe | None":
        """The recipe in a row's SamplingParams.extra_args; None for a row that is in no group."""
        return Recipe(**extra_args[MIX]) if extra_args and MIX in extra_args else None


@dataclass(frozen=True, slots=True)
class MixedSampling:
    """What EngineRollouts hands on for a row with mixed policies, in place of the engine's own parameters."""

    spec: SamplingSpec
    seed: int | None


class GroupEngine(Protocol):
    """What a group needs of its engine."""

    max_model_len: int

    def member_deltas(
        self, row: int, prompt: TokenPrompt, spec: SamplingSpec, recipe: Recipe, request_id: str
    ) -> AsyncGenerator[Delta, None]: ...


class _OutOfStep(Exception):
    """Rows of the group emitted different tokens."""


class MixedRow:
    """One answer of a mixture: the deltas that its rows agree on."""

    def __init__(
        self, engine: GroupEngine, row: int, prompt: TokenPrompt, sampling: MixedSampling, request_id: str
    ) -> None:
        """Raises RequestError if a mixed policy's prompt leaves no room for an answer."""
        self._engine = engine
        self._row = row
        self._prompts = [prompt, *(TokenPrompt(m.token_ids, m.adapter) for m in prompt.mix)]
        self._mix: tuple[Mixed, ...] = prompt.mix
        longest = max(len(p.token_ids) for p in self._prompts)
        room = engine.max_model_len - longest
        if room < 1:
            raise RequestError(
                f"a mixed policy's prompt has {longest} tokens; the model's context is {engine.max_model_len}, "
                "one of which must be left"
            )
        # All rows grow by the same tokens, so the longest prompt's context bounds the answer.
        self._spec = replace(sampling.spec, max_tokens=min(sampling.spec.max_tokens, room), stream=True)
        self._seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        self._id = request_id
        self._ids: list[str] = []
        self._aborted = False
        self._taken: list[int] = []
        self._characters = 0

    def abandon(self) -> list[str]:
        """Lets `deltas` end with finish reason "abort"; returns the engine's requests that are to be aborted."""
        self._aborted = True
        return self._ids

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answer's deltas, its end among them. Raises EngineUnavailable if the rows cannot be kept in step."""
        for attempt in range(TRIES):
            try:
                async with aclosing(self._attempt(attempt)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except _OutOfStep:
                if self._aborted:
                    break
        if not self._aborted:
            raise EngineUnavailable(
                f"the rows of a mixture fell out of step {TRIES} times; the engine may be short of KV memory"
            )
        yield Delta(self._row, "", (), "abort")

    async def _attempt(self, attempt: int) -> AsyncGenerator[Delta, None]:
        group = f"{self._id}.{attempt}"
        self._ids = [f"{group}.{role}" for role in range(len(self._prompts))]
        rows = [self._member(role, group) for role in range(len(self._prompts))]
        partners = [_Partner(row) for row in rows[1:]]
        seen: list[int] = []
        characters = 0
        try:
            async with aclosing(rows[0]) as deltas:
                async for delta in deltas:
                    if self._aborted or delta.finish_reason == "abort":
                        raise _OutOfStep
                    start, text_start = len(seen), characters
                    seen += delta.token_ids
                    characters += len(delta.text)
                    for partner in partners:
                        if await partner.tokens(start, len(seen)) != list(delta.token_ids):
                            raise _OutOfStep
                    known, shown = max(0, len(self._taken) - start), max(0, self._characters - text_start)
                    self._taken += delta.token_ids[known:]
                    self._characters = max(self._characters, characters)
                    news = replace(
                        delta,
                        text=delta.text[shown:],
                        token_ids=delta.token_ids[known:],
                        logprobs=None if delta.logprobs is None else delta.logprobs[known:],
                    )
                    if news.text or news.token_ids or news.finish_reason:
                        yield news
        finally:
            for partner in partners:
                await partner.end()

    def _member(self, role: int, group: str) -> AsyncGenerator[Delta, None]:
        recipe = Recipe(group, role, len(self._prompts), self._taken[:])
        spec = self._spec
        if role == 0:
            recipe = replace(
                recipe,
                weights=[m.weight for m in self._mix],
                seed=self._seed,
                temperature=spec.temperature,
                top_k=spec.top_k,
                top_p=spec.top_p,
                min_p=spec.min_p,
                plausibility=self._prompts[0].plausibility,
            )
            # The processor draws; the engine has but to take what it is given.
            spec = replace(spec, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
        else:
            spec = SamplingSpec(
                spec.max_tokens,
                temperature=0.0,
                stop_token_ids=spec.stop_token_ids,
                ignore_eos=spec.ignore_eos,
                priority=spec.priority,
            )
        return self._engine.member_deltas(self._row, self._prompts[role], spec, recipe, self._ids[role])


class _Partner:
    """Reads the tokens of a mixed policy's row as they come."""

    def __init__(self, deltas: AsyncGenerator[Delta, None]) -> None:
        self._tokens: list[int] = []
        self._over = False
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read(deltas))

    async def _read(self, deltas: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    self._tokens += delta.token_ids
                    self._news.set()
        finally:
            self._over = True
            self._news.set()

    async def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start to stop, fewer if the row ended before. Raises the error that ended it."""
        while len(self._tokens) < stop and not self._over:
            self._news.clear()
            await self._news.wait()
        if len(self._tokens) < stop:
            await self._task
        return self._tokens[start:stop]

    async def end(self) -> None:
        """Ends the row."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
