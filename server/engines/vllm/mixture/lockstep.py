"""Answers decoded by several policies in lockstep: one sequence per policy, every one emitting every token.

Inside the engine a logits processor (mixing.py) sees the sequences of a group side by side, draws one token from their
mixture and makes every one emit it. A sequence out of step (its partners are missing from the batch, or at another
place of the answer) emits a token that no partner emits there. So a token is accepted only once all sequences of the
group have emitted it; at the first that differs the group is aborted and started again, replaying what was accepted.
Noise is drawn by seed and place in the answer: the new group continues as the old one would have.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from guiderail.guides.core.errors import EngineUnavailable, RequestError
from guiderail.guides.core.types import Delta, SamplingSpec, TokenPrompt
from guiderail.server.engines.sequences import EngineSequence
from guiderail.server.engines.vllm.mixture.recipe import Recipe

TRIES = 8


class _OutOfStep(Exception):
    """Sequences of the group emitted different tokens."""


class MixedSequence:
    """server.engines.sequences.EngineSequence of a mixture: the deltas that its members agree on."""

    def __init__(
        self,
        index: int,
        prompt: TokenPrompt,
        sampling: SamplingSpec,
        seed: int | None,
        max_model_len: int,
        member: Callable[[TokenPrompt, SamplingSpec, Recipe], EngineSequence],
        name: str,
    ) -> None:
        """member: makes the sequence of one policy; its deltas carry `index`, and text where its role is 0.

        name: no other mixture's. Raises RequestError if a mixed policy's prompt leaves no room for an answer.
        """
        self._index = index
        self._prompts = [prompt, *(TokenPrompt(m.token_ids, m.adapter) for m in prompt.mix)]
        self._weights = [m.weight for m in prompt.mix]
        longest = max(len(p.token_ids) for p in self._prompts)
        room = max_model_len - longest
        if room < 1:
            raise RequestError(
                f"a mixed policy's prompt has {longest} tokens; the model's context is {max_model_len}, "
                "one of which must be left"
            )
        # All members grow by the same tokens, so the longest prompt's context bounds the answer.
        self._spec = replace(sampling, max_tokens=min(sampling.max_tokens, room), stream=True)
        self._seed = secrets.randbits(62) if seed is None else seed
        self._member = member
        self._name = name
        self._members: list[EngineSequence] = []
        self._aborted = False
        self._accepted: list[int] = []
        self._characters = 0

    def give_up(self) -> Sequence[str]:
        """Let `deltas` end with finish reason "abort"; return the ids of the members' work."""
        self._aborted = True
        return [each for member in self._members for each in member.give_up()]

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the answer's deltas. Raises EngineUnavailable if the members cannot be kept in step."""
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
                f"the sequences of a mixture fell out of step {TRIES} times; the engine may be short of KV memory"
            )
        yield Delta(self._index, "", (), "abort")

    async def _attempt(self, attempt: int) -> AsyncGenerator[Delta, None]:
        """Start the members and yield what is new of the tokens that they agree on. Raises _OutOfStep."""
        group = f"{self._name}.{attempt}"
        self._members = [self._member(*self._part(group, role)) for role in range(len(self._prompts))]
        partners = [_Partner(member.deltas()) for member in self._members[1:]]
        emitted = characters = 0
        try:
            async with aclosing(self._members[0].deltas()) as deltas:
                async for delta in deltas:
                    if self._aborted or delta.finish_reason == "abort":
                        raise _OutOfStep
                    start, text_start = emitted, characters
                    emitted += len(delta.token_ids)
                    characters += len(delta.text)
                    for partner in partners:
                        if await partner.tokens(start, emitted) != list(delta.token_ids):
                            raise _OutOfStep
                    known, shown = max(0, len(self._accepted) - start), max(0, self._characters - text_start)
                    self._accepted += delta.token_ids[known:]
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

    def _part(self, group: str, role: int) -> tuple[TokenPrompt, SamplingSpec, Recipe]:
        """Return the prompt, sampling and recipe of a member."""
        spec, recipe = self._spec, Recipe(group, role, len(self._prompts), self._accepted[:])
        if role == 0:
            recipe = replace(
                recipe,
                weights=self._weights,
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
        return self._prompts[role], spec, recipe


class _Partner:
    """Reads the tokens of a mixed policy's sequence as they come."""

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
        """Return tokens start to stop, fewer if the sequence ended before. Raises the error that ended it."""
        while len(self._tokens) < stop and not self._over:
            self._news.clear()
            await self._news.wait()
        if len(self._tokens) < stop:
            await self._task
        return self._tokens[start:stop]

    async def end(self) -> None:
        """End the sequence."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
