"""Fakes that test our own logic: a scripted engine with known timing and faults, a renderer, a reward."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from guiderail.guides import Message, Reward, ScoreResult, TextReward
from guiderail.guides.core.errors import EngineUnavailable
from guiderail.guides.core.seeds import Seeds
from guiderail.guides.core.types import Delta, SamplingSpec, ScoreGroup, TokenLogprob, TokenPrompt
from guiderail.server.engines.engine_stats import EngineStats
from guiderail.server.engines.sequences import EngineRollouts, new_request_id


@dataclass
class ScriptedSequence:
    """One sequence of a ScriptedEngine."""

    engine: "ScriptedEngine"
    row: int
    prompt: TokenPrompt
    params: Any
    request_id: str = field(default_factory=new_request_id)

    def deltas(self) -> AsyncGenerator[Delta, None]:
        return self.engine.deltas(self.row, self.prompt, self.params, self.request_id)

    def give_up(self) -> Sequence[str]:
        return [self.request_id]


ROWS_OF_10 = {seed: 10 + row for row, seed in enumerate(Seeds(10).stream(128))}


@dataclass
class ScriptedEngine:
    """Answers every sequence with the words of `script(its number)`, one token a word, `step_s` apart.

    The number of a sequence is its seed; sequences 0, 1, ... of the first answer to a request with seed 10 are 10, 11, ...

    `aborted` has the sequences of each call that aborted some.

    Sequences count as running until they end or are aborted, so tests can see what was freed.
    """

    script: Callable[[int], Sequence[str]] = lambda seed: [f"w{seed}", " one", " two", " three"]
    step_s: float = 0.0
    fail_after: int | None = None
    max_model_len: int = 512
    vocab_size: int = 1000
    max_logprobs: int = 5
    dtype: str = "float32"
    up: bool = True
    stats: EngineStats = field(default_factory=EngineStats)
    running: set[str] = field(default_factory=set)
    aborted: list[list[str]] = field(default_factory=list)
    silent: bool = False
    peak: int = 0
    _stops: dict[str, asyncio.Event] = field(default_factory=dict)

    @property
    def answers(self) -> bool:
        return self.up and not self.silent

    def num_running(self) -> int:
        return len(self.running)

    def generate(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: SamplingSpec,
        *,
        seeds: Sequence[int | None] | None = None,
        deadline: float | None = None,
    ) -> EngineRollouts:
        if not self.up:
            raise EngineUnavailable("the engine is down")
        params = [(sampling, seed) for seed in (seeds or [sampling.seed] * len(prompts))]
        sequences = [ScriptedSequence(self, row, p, params[row]) for row, p in enumerate(prompts)]
        return EngineRollouts(sequences, deadline, self.abort)

    async def deltas(self, row: int, prompt: TokenPrompt, params: Any, request_id: str) -> AsyncGenerator[Delta, None]:
        sampling, seed = params
        words = list(self.script(ROWS_OF_10.get(seed, seed or 0)))
        stop = self._stops[request_id] = asyncio.Event()
        self.running.add(request_id)
        self.peak = max(self.peak, len(self.running))
        held: list[str] = []
        try:
            for i, word in enumerate(words):
                if self.fail_after is not None and i >= self.fail_after:
                    raise EngineUnavailable("the engine process died")
                try:
                    async with asyncio.timeout(self.step_s):
                        await stop.wait()
                    yield Delta(row, "".join(held), tuple(range(len(held))), "abort")
                    return
                except TimeoutError:
                    pass
                at_limit = i + 1 >= sampling.max_tokens
                last = at_limit or i + 1 == len(words)
                held.append(word)
                if sampling.stream or last:
                    reason = None if not last else "stop" if i + 1 == len(words) else "length"
                    ids = tuple(range(i + 1 - len(held), i + 1))
                    logprobs = None
                    if sampling.logprobs is not None:
                        logprobs = tuple(TokenLogprob(t, -0.5, ((t, -0.5),)) for t in ids)
                    yield Delta(row, "".join(held), ids, reason, None, logprobs)
                    held = []
                if last:
                    return
        finally:
            self.running.discard(request_id)

    async def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted.append(list(request_ids))
        for each in request_ids:
            self.running.discard(each)
            if each in self._stops:
                self._stops[each].set()

    async def next_token_logprobs(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[dict[int, float]]:
        return [dict.fromkeys(range(top_k), -1.0) for _ in prompts]

    async def answer_logprobs(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        return [[-1.0] * len(answer) for answer in answers]


class LetterRenderer:
    """One token a character."""

    has_chat_template = True
    eos_token_ids: frozenset[int] = frozenset()

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> TokenPrompt:
        return TokenPrompt(tuple(self.encode("".join(m.content for m in messages) + ">")))

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]:
        return [ord(c) % 1000 for c in text]

    def encode_prompt(self, text: str, *, opens: bool = True) -> list[int]:
        return self.encode(text, add_special_tokens=opens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes | None:
        return chr(token_id).encode(errors="replace")


class LastDigit(TextReward):
    """The digit that the first word ends with."""

    def score_text(self, prompt: str, answer: str, params: Any) -> float:
        return float(answer.split()[0][-1])


class Faulty(Reward):
    """Does what its `fault` says: "raise", "nan", "short", "hang", or scores 1."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.batches: list[int] = []

    async def score(self, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
        self.batches.append(len(groups))
        if self.fault == "hang":
            await asyncio.sleep(3600)
        if self.fault == "raise" or (
            self.fault == "bad-group" and any(a.text == "bad" for g in groups for a in g.answers)
        ):
            raise RuntimeError("broken on purpose")
        if self.fault == "engine":
            raise EngineUnavailable("the engine is down")
        value = float("nan") if self.fault == "nan" else 1.0
        short = 1 if self.fault == "short" else 0
        return [ScoreResult((value,) * (len(group.answers) - short)) for group in groups]


def make_state(engine: ScriptedEngine, rewards: dict[str, Reward] | None = None, **settings: Any) -> Any:
    """A server state over fakes and the built-in guides."""
    from guiderail.guides.core.interfaces import Services
    from guiderail.guides.core.registry import load_guides
    from guiderail.server.metrics import Metrics
    from guiderail.server.runtime import assemble
    from guiderail.server.settings import Settings

    renderer: Any = LetterRenderer()
    all_rewards = {"last_digit": LastDigit(), **(rewards or {})}
    config = Settings(served_model_name="fake", **settings)
    guides = load_guides(["sampling", "best_of_n"])
    services = Services(engine, renderer, context=lambda: engine.max_model_len)
    return assemble(config, engine, renderer, guides, all_rewards, services, Metrics("fake"))
