"""The Engine and Renderer protocols over tabular policies (tabular.py), with vLLM's rules of generation.

Rows advance in lockstep, one token a step, and only when the guide asks for the next delta: what a guide drops is
gone at once, so that spend can be compared to formulas. Or, with `pace`, at different and changing speeds. A `Clock` makes steps take time, for deadlines.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from tabular import EOS, Ids, Tabular

from guiderail.guides.core.errors import EngineUnavailable
from guiderail.guides.core.types import Delta, Message, SamplingSpec, TokenLogprob, TokenPrompt

PROMPT: Ids = (1000, 1001)
FIRST_PROMPT_TOKEN = 1000
UNFINISHED = "\ufffd"
LETTERS = "$abcdefghijklmnopqrstuvwxyz"


class TabularRenderer:
    """One letter a token from 1 on; token 0, the end, is a special token "$". Prompts are tokens from 1000 on.

    With `texts` tokens are bytes of UTF-8 instead, which may be parts of characters.
    """

    has_chat_template = True

    def __init__(self, texts: Mapping[int, bytes] | None = None, *, eos: bool = True) -> None:
        self._texts = texts
        self.eos_token_ids = frozenset({EOS} if eos else ())

    def render(self, messages: Sequence[Message], **how: bool) -> TokenPrompt:
        """The messages' characters; PROMPT for the usual one."""
        ids = tuple(FIRST_PROMPT_TOKEN + ord(c) for m in messages for c in m.content)
        return TokenPrompt(PROMPT if len(messages) == 1 else ids)

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]:
        return [ord(c) - ord("a") + 1 for c in text]

    def encode_prompt(self, text: str, *, opens: bool = True) -> list[int]:
        return self.encode(text, add_special_tokens=opens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            token_ids = [token for token in token_ids if token != EOS]
        if self._texts is None:
            return "".join([LETTERS[token] if token < FIRST_PROMPT_TOKEN else "." for token in token_ids])
        texts = {EOS: b"$", **self._texts}
        return b"".join([texts.get(token, b".") for token in token_ids]).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes | None:
        if self._texts is None:
            return self.token_text(token_id).encode()
        return {EOS: b"$", **self._texts}.get(token_id, b".")


@dataclass
class Clock:
    """Stands in for the module `time` where guides read it."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class _Row:
    """All that a row will be, and how much of it was sent."""

    ids: Ids
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    stop_reason: int | str | None
    texts: list[str]  # of the first 1, 2, ... tokens, as streamed; of all tokens alone, if not streamed
    stream: bool
    dropped: str | None = None
    at: int = 0  # tokens that are there
    sent: int = 0

    def delta(self, row: int, reason: str | None, with_logprobs: bool) -> Delta:
        start, upto = self.sent, self.at
        ids = self.ids[start:upto]
        text = ""
        if self.stream and upto > start:
            text = self.texts[upto - 1][len(self.texts[start - 1]) if start else 0 :]
        elif upto == len(self.ids):
            text = self.texts[-1]
        logprobs = self.logprobs[start:upto] if with_logprobs else None
        self.sent = upto
        return Delta(row, text, ids, reason, self.stop_reason if reason == "stop" else None, logprobs)


@dataclass
class TabularEngine:
    """Serves policies by adapter, or by the prompt's own tokens; None is the served model.

    clock: gains a second with each step. pace: decides which rows get a token at a step; None: all do.
    fail_after: tokens after which the engine is lost.
    """

    policies: Mapping[str | Ids | None, Any]
    renderer: TabularRenderer = field(default_factory=TabularRenderer)
    clock: Clock | None = None
    pace: random.Random | None = None
    fail_after: int | None = None
    max_model_len: int = 512
    vocab_size: int = 8
    max_logprobs: int = 50
    dtype: str = "float32"
    rows: int = 0
    peak: int = 0
    tokens: int = 0
    _cdfs: dict[Any, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Tabular, **more: Any) -> "TabularEngine":
        """An engine that serves one policy; `adapters` are others by name."""
        return cls({None: policy, **more.pop("adapters", {})}, **more)

    def num_running(self) -> int:
        return self.rows

    def distribution(self, prompt: TokenPrompt) -> np.ndarray:
        """The distribution of the token after a prompt, mixed with that of the prompt's other policies."""
        distribution = self._alone(prompt)
        if not prompt.mix and not prompt.plausibility:
            return distribution
        with np.errstate(divide="ignore"):
            z = np.log(distribution) + sum(
                m.weight * np.log(self._alone(TokenPrompt(m.token_ids, m.adapter))) for m in prompt.mix
            )
        z[distribution < prompt.plausibility * distribution.max()] = -np.inf
        p: np.ndarray = np.exp(z - z.max())
        return p / p.sum()

    def _alone(self, prompt: TokenPrompt) -> np.ndarray:
        at = next((i for i, token in enumerate(prompt.token_ids) if token < FIRST_PROMPT_TOKEN), len(prompt.token_ids))
        policy = self.policies.get(prompt.token_ids[:at])
        distribution: np.ndarray = (policy or self.policies[prompt.adapter]).distribution(prompt.token_ids[at:])
        return distribution

    def generate(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: SamplingSpec,
        *,
        seeds: Sequence[int | None] | None = None,
        deadline: float | None = None,
    ) -> "LockstepRollouts":
        return LockstepRollouts(self, prompts, sampling, seeds or [sampling.seed] * len(prompts), deadline)

    async def next_token_logprobs(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[dict[int, float]]:
        assert 0 < top_k <= self.max_logprobs, f"top_k {top_k}: vLLM would refuse it"
        self.rows += len(prompts)
        try:
            await self.step(len(prompts))
        finally:
            self.rows -= len(prompts)
        return [_top(self.distribution(prompt), top_k) for prompt in prompts]

    async def answer_logprobs(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        return [
            [float(np.log(self.distribution(prompt.extended(answer[:t]))[z])) for t, z in enumerate(answer)]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    async def step(self, tokens: int) -> None:
        """Time passes, others get their turn, and the engine may be lost."""
        self.tokens += tokens
        self.peak = max(self.peak, self.rows)
        if self.fail_after is not None and self.tokens > self.fail_after:
            raise EngineUnavailable("the engine process died")
        if self.clock is not None:
            self.clock.now += 1.0
            await asyncio.sleep(0)

    def row(self, prompt: TokenPrompt, sampling: SamplingSpec, seed: int | None) -> _Row:
        """Samples a whole row, by the rules of vLLM."""
        rng = random.Random(seed)
        before = len(self._decode(prompt.token_ids, sampling))
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        texts: list[str] = []
        reason, stop_reason, free = "length", None, 0
        while reason == "length" and len(ids) < sampling.max_tokens:
            at = prompt.extended(ids)
            token = self._draw(at, sampling, len(ids), rng)
            ids.append(token)
            if sampling.logprobs is not None:
                distribution = self.distribution(at)
                top = _top(distribution, sampling.logprobs) | {token: float(np.log(distribution[token]))}
                logprobs.append(TokenLogprob(token, float(np.log(distribution[token])), tuple(top.items())))
            shown = ids
            if (token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids:
                reason, stop_reason = "stop", None if token == EOS and not sampling.ignore_eos else token
                shown = ids if sampling.include_stop_str_in_output else ids[:-1]
            elif not sampling.stop and not sampling.stream and len(ids) < sampling.max_tokens:
                continue
            texts.append(self._decode((*prompt.token_ids, *shown), sampling)[before:])
            if len(ids) <= sampling.min_tokens:
                free = len(texts[-1])
            elif (found := _stop(texts[-1], sampling, free)) is not None:
                reason, (stop_reason, texts[-1]) = "stop", found
        held = 0 if sampling.include_stop_str_in_output else max((len(s) for s in sampling.stop), default=1) - 1
        streamed = [texts[-1][: max(0, len(each) - held)] for each in texts[:-1]]
        return _Row(tuple(ids), tuple(logprobs), reason, stop_reason, [*streamed, texts[-1]], sampling.stream)

    def _decode(self, ids: Sequence[int], sampling: SamplingSpec) -> str:
        """Text; a token that leaves half a character at the end is not shown until the rest is there."""
        decode = self.renderer.decode
        while (text := decode(ids, skip_special_tokens=sampling.skip_special_tokens)).endswith(UNFINISHED):
            ids = ids[:-1]
        return text

    def _draw(self, prompt: TokenPrompt, sampling: SamplingSpec, at: int, rng: random.Random) -> int:
        barred = (EOS, *sampling.stop_token_ids) if at < sampling.min_tokens else ()
        key = (prompt, sampling.temperature, barred, sampling.allowed_token_ids)
        cdf = self._cdfs.get(key)
        if cdf is None:
            p = self.distribution(prompt).copy()
            p[[token for token in barred if token < len(p)]] = 0
            if sampling.allowed_token_ids is not None:
                p[[token for token in range(len(p)) if token not in sampling.allowed_token_ids]] = 0
            cold = max(sampling.temperature, 0.01)  # the coldest of vLLM
            p = np.eye(len(p))[int(p.argmax())] if sampling.temperature == 0 else p ** (1 / cold)
            cdf = self._cdfs[key] = (np.cumsum(p) / p.sum()).tolist()
        u = rng.random()
        return next(token for token, mass in enumerate(cdf) if u < mass)


def _top(distribution: np.ndarray, k: int) -> dict[int, float]:
    order = [int(i) for i in np.argsort(-distribution, kind="stable")[:k] if distribution[i] > 0]
    return {i: float(np.log(distribution[i])) for i in order}


def _stop(text: str, sampling: SamplingSpec, free: int) -> tuple[str, str] | None:
    """(stop string, text cut at it) for the first that is complete, in vLLM's order."""
    ends = []
    for order, stop in enumerate(sampling.stop):
        at = text.find(stop, max(0, free + 1 - len(stop)))
        if at >= 0:
            ends.append((at + len(stop), order))
    if not ends:
        return None
    end, order = min(ends)
    stop = sampling.stop[order]
    return stop, text[: end if sampling.include_stop_str_in_output else end - len(stop)]


class LockstepRollouts:
    """guiderail.guides.Rollouts over rows that get their tokens at the same time, unless the engine has a pace."""

    def __init__(
        self,
        engine: TabularEngine,
        prompts: Sequence[TokenPrompt],
        sampling: SamplingSpec,
        seeds: Sequence[int | None],
        deadline: float | None,
    ) -> None:
        self._engine = engine
        self._rows = [engine.row(p, sampling, seed) for p, seed in zip(prompts, seeds, strict=True)]
        self._logprobs = sampling.logprobs is not None
        self._deadline = deadline
        self._running: dict[int, _Row] = {}

    async def __aenter__(self) -> Self:
        self._running = dict(enumerate(self._rows))
        self._engine.rows += len(self._rows)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._engine.rows -= len(self._running)
        self._running = {}

    async def drop(self, row: int, reason: str = "dropped") -> None:
        if row in self._running and self._running[row].dropped is None:
            self._running[row].dropped = reason

    async def __aiter__(self) -> AsyncIterator[Delta]:
        engine = self._engine
        while self._running:
            await engine.step(sum(row.dropped is None for row in self._running.values()))
            if self._deadline is not None and engine.clock and engine.clock.now >= self._deadline:
                for number in list(self._running):
                    await self.drop(number, "deadline")
            for number, row in list(self._running.items()):
                reason = row.dropped
                if reason is None:
                    if engine.pace is not None and engine.pace.random() < 0.6:
                        continue
                    row.at += 1
                    reason = row.finish_reason if row.at == len(row.ids) else None
                if reason is not None:
                    del self._running[number]
                    engine.rows -= 1
                elif not row.stream:
                    continue
                yield row.delta(number, reason, self._logprobs)
