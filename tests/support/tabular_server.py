"""A server state over a tabular engine: every built-in guide, two rewards, real sampling; nothing is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from contexts import FakeComparisons
from every_guide import Endless, Values
from tabular_engine import FIRST_PROMPT_TOKEN, TabularEngine, TabularRenderer

from guiderail.guides.core.guide import Guide
from guiderail.guides.core.interfaces import ScoreResult, Services
from guiderail.guides.core.registry import load_guides
from guiderail.guides.core.reward import Reward
from guiderail.guides.core.types import Message, ScoreGroup, TokenPrompt
from guiderail.server.engines.engine_stats import EngineStats
from guiderail.server.metrics import Metrics
from guiderail.server.runtime import assemble
from guiderail.server.settings import Settings


class PromptRenderer(TabularRenderer):
    """Its prompts, a prompter's own text too, are tokens from 1000 on; answers are letters."""

    def render(self, messages: Sequence[Message], **how: bool) -> TokenPrompt:
        return TokenPrompt(tuple(FIRST_PROMPT_TOKEN + ord(c) for m in messages for c in m.content))

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]:
        if add_special_tokens:
            return [FIRST_PROMPT_TOKEN + ord(c) for c in text]
        return super().encode(text)


class Hashed(Reward):
    """A hash of the answer's text in [0, 1)."""

    def __init__(self, salt: int) -> None:
        self._values = Values(salt)

    async def score(self, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
        return [ScoreResult(tuple(self._values[list(a.text.encode())] for a in g.answers)) for g in groups]


@dataclass
class ServedTabular(TabularEngine):
    """A tabular engine as the routes see one."""

    max_model_len: int = 100_000
    up: bool = True
    stats: EngineStats = field(default_factory=EngineStats)


def tabular_state(end: float = 0.1, texts: Mapping[int, bytes] | None = None, **settings: Any) -> Any:
    """A state with the rewards "a" and "b", the adapter "adapter", and all built-in guides."""
    renderer: Any = PromptRenderer(texts)
    policies = {None: Endless(seed=1, end=end), "adapter": Endless(seed=2, end=end)}
    engine = ServedTabular(policies, renderer=renderer)
    services = Services(engine, renderer, frozenset({"adapter"}), "fake")
    rewards: Mapping[str, Reward] = {"a": Hashed(1), "b": Hashed(2)}
    built_in = ("sampling", "best_of_n", "speculative_rejection", "controlled_decoding", "transfer_q", "args", "deal")
    guides: Mapping[str, type[Guide]] = load_guides([*built_in, "logit_mix"])
    config = Settings(served_model_name="fake", lora={"adapter": "/nowhere"}, **settings)
    state = assemble(config, engine, renderer, guides, rewards, services, Metrics("fake"))
    compared = FakeComparisons()  # an encoder and a judge that are formulas
    return replace(state, scorers=replace(state.scorers, embedder=compared, judge=compared))
