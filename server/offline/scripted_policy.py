"""A policy without a model: it writes short English sentences at random, at once, and the same ones for a seed.

Its tokens are words, so that blocks and single tokens can be told apart by eye, and bytes for all other text. The next
word depends on the last one alone, by a small grammar.
"""

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import fields

import numpy as np

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.types import Delta, Message, SamplingSpec, TokenLogprob, TokenPrompt
from guiderail.guides.scoring.transforms import Array
from guiderail.server.engines.sequences import EngineRollouts

WORDS = {  # by their kind
    "opening": ("The", "A", "My", "Every"),
    "reopening": (" The", " A", " My", " Every"),
    "article": (" the", " a", " my", " every"),
    "adjective": (" red", " old", " small", " clever", " quiet", " happy"),
    "noun": (" fox", " river", " teacher", " apple", " city", " robot", " garden", " friend"),
    "verb": (" finds", " likes", " sings", " waits", " grows", " helps"),
    "adverb": (" slowly", " gladly", " today", " again"),
    "conjunction": (" and", " but"),
    "end": (".", "!"),
}
AFTER = {  # kinds that follow a kind, with their probabilities; "" is the end of the answer
    "start": {"opening": 1.0},
    "opening": {"adjective": 0.4, "noun": 0.6},
    "reopening": {"adjective": 0.4, "noun": 0.6},
    "article": {"adjective": 0.3, "noun": 0.7},
    "adjective": {"adjective": 0.2, "noun": 0.8},
    "noun": {"verb": 0.7, "conjunction": 0.1, "end": 0.2},
    "verb": {"adverb": 0.4, "article": 0.4, "end": 0.2},
    "adverb": {"end": 0.7, "conjunction": 0.3},
    "conjunction": {"article": 1.0},
    "end": {"reopening": 0.5, "": 0.5},
}
EOS, FIRST_WORD = 0, 257  # tokens 1 to 256 are bytes
TEXTS = [text for texts in WORDS.values() for text in texts]
IDS = {text: FIRST_WORD + i for i, text in enumerate(TEXTS)}
KIND_OF = {IDS[text]: kind for kind, texts in WORDS.items() for text in texts}
PIECES = re.compile("|".join(map(re.escape, sorted(TEXTS, key=len, reverse=True))))
LEAST = 1e-6  # probability of a word that the grammar does not allow
KNOWN = {
    "max_tokens", "temperature", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "min_tokens",
    "ignore_eos", "logit_bias", "logprobs", "skip_special_tokens", "stream", "priority",
}  # fmt: skip


def _table() -> dict[str, Array]:
    """Probabilities [tokens] of the next token by the last one's kind."""
    likings = np.random.default_rng(0).uniform(0.5, 2.0, len(TEXTS))
    table = {}
    for kind, following in AFTER.items():
        p = np.zeros(FIRST_WORD + len(TEXTS))
        p[FIRST_WORD:] = LEAST
        for next_kind, mass in following.items():
            ids = [IDS[text] for text in WORDS[next_kind]] if next_kind else [EOS]
            shares = np.array([likings[token - FIRST_WORD] if next_kind else 1.0 for token in ids])
            p[ids] += mass * shares / shares.sum()
        table[kind] = p / p.sum()
    return table


TABLE = _table()


class ScriptedRenderer:
    """guiderail.guides.Renderer of the policy's tokens."""

    has_chat_template = True
    eos_token_ids = frozenset({EOS})

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> TokenPrompt:
        """One line a message, as `user: ...`."""
        lines = [f"{message.role}: {message.content}" for message in messages]
        return TokenPrompt(tuple(self.encode("\n".join([*lines, *(["assistant:"] if add_generation_prompt else [])]))))

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]:
        """The known words of the text as tokens, all else byte by byte."""
        ids: list[int] = []
        done = 0
        for found in PIECES.finditer(text):
            ids += [1 + byte for byte in text[done : found.start()].encode()] + [IDS[found.group()]]
            done = found.end()
        return ids + [1 + byte for byte in text[done:].encode()]

    def encode_prompt(self, text: str, *, opens: bool = True) -> list[int]:
        """The same: there are no control tokens."""
        return self.encode(text)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The tokens' text; the end of the sequence has none."""
        parts = [bytes([t - 1]) if t < FIRST_WORD else TEXTS[t - FIRST_WORD].encode() for t in token_ids if t != EOS]
        return b"".join(parts).decode(errors="replace")


class ScriptedPolicy:
    """guiderail.guides.Engine of the policy. What it cannot do is refused with a RequestError."""

    def __init__(self, renderer: ScriptedRenderer) -> None:
        self._renderer = renderer

    def generate(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: SamplingSpec,
        *,
        seeds: Sequence[int | None] | None = None,
        deadline: float | None = None,
    ) -> EngineRollouts:
        """Continue each prompt. Raises RequestError for mixed policies and sampling fields that it does not have."""
        others = [field for field in fields(SamplingSpec) if field.name not in KNOWN]
        unknown = [field.name for field in others if getattr(sampling, field.name) != field.default]
        if unknown or any(prompt.mix or prompt.adapter for prompt in prompts):
            raise RequestError(f"the scripted policy has no {unknown[0] if unknown else 'other policies'}")
        given = seeds or [sampling.seed] * len(prompts)
        return EngineRollouts(
            [
                _Sequence(self._renderer, index, prompt, sampling, seed)
                for index, (prompt, seed) in enumerate(zip(prompts, given, strict=True))
            ],
            deadline,
        )

    async def next_token_logprobs(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[dict[int, float]]:
        """Log-probabilities of the `top_k` likeliest next tokens after each prompt, by token id."""
        return [_top(_distribution(prompt.token_ids), top_k) for prompt in prompts]

    async def answer_logprobs(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-probability of each token of the answers; of one that it never writes that of 1e-12."""
        return [
            [
                float(np.log(max(1e-12, _distribution((*prompt.token_ids, *answer[:at]))[token])))
                for at, token in enumerate(answer)
            ]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


class _Sequence:
    """server.engines.sequences.EngineSequence of one continuation."""

    def __init__(
        self, renderer: ScriptedRenderer, index: int, prompt: TokenPrompt, sampling: SamplingSpec, seed: int | None
    ) -> None:
        self._renderer = renderer
        self._index = index
        self._prompt = prompt.token_ids
        self._sampling = sampling
        self._random = random.Random(seed)
        self._given_up = False

    def give_up(self) -> Sequence[str]:
        self._given_up = True
        return ()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        sampling = self._sampling
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        sent = sent_text = 0
        text, reason, stop_reason = "", None, None
        while reason is None:
            await asyncio.sleep(0)
            if self._given_up:
                reason = "abort"
            else:
                token, logprob = self._draw(ids)
                ids.append(token)
                logprobs.append(logprob)
                text, reason, stop_reason = self._end(ids)
            if reason is None and not sampling.stream:
                continue
            shown = len(text) if reason or not sampling.stop else sent_text  # it may be the beginning of a stop string
            yield Delta(
                self._index, text[sent_text:shown], tuple(ids[sent:]), reason, stop_reason,
                None if sampling.logprobs is None else tuple(logprobs[sent:]),
            )  # fmt: skip
            sent, sent_text = len(ids), shown

    def _draw(self, ids: Sequence[int]) -> tuple[int, TokenLogprob]:
        sampling = self._sampling
        p = _distribution((*self._prompt, *ids))
        weights = p.copy()
        for token, bias in sampling.logit_bias.items():
            weights[token] *= np.exp(bias)
        if len(ids) < sampling.min_tokens:
            weights[[EOS, *sampling.stop_token_ids]] = 0
        if sampling.temperature == 0:
            token = int(weights.argmax())
        else:
            weights **= 1 / sampling.temperature
            token = self._random.choices(range(len(weights)), weights.tolist())[0]
        top = tuple(_top(p, sampling.logprobs or 0).items())
        return token, TokenLogprob(token, float(np.log(max(1e-12, p[token]))), top)

    def _end(self, ids: Sequence[int]) -> tuple[str, str | None, int | str | None]:
        """(text, finish_reason, stop_reason) of the sequence so far, by vLLM's rules."""
        sampling, last = self._sampling, ids[-1]
        own = last in sampling.stop_token_ids
        if own or (last == EOS and not sampling.ignore_eos):
            kept = ids if sampling.include_stop_str_in_output else ids[:-1]
            return self._renderer.decode(kept), "stop", last if own else None
        text = self._renderer.decode(ids)
        free = len(self._renderer.decode(ids[: sampling.min_tokens]))  # in which no stop string may end
        found = [(text.find(stop, max(0, free + 1 - len(stop))), stop) for stop in sampling.stop]
        ends = [(at + len(stop), stop) for at, stop in found if at >= 0]
        if ends and len(ids) > sampling.min_tokens:
            end, stop = min(ends, key=lambda each: each[0])
            return text[: end if sampling.include_stop_str_in_output else end - len(stop)], "stop", stop
        return text, "length" if len(ids) >= sampling.max_tokens else None, None


def _distribution(ids: Sequence[int]) -> Array:
    return TABLE[KIND_OF.get(ids[-1], "start") if ids else "start"]


def _top(p: Array, k: int) -> dict[int, float]:
    order = np.argsort(-p, kind="stable")[:k].tolist()
    return {token: float(np.log(p[token])) for token in order if p[token] > 0}
