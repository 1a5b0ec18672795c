"""The parts of a running server. One frozen object, handed to the routes; there are no globals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from guiderail.guides.core.guide import Guide
from guiderail.guides.core.reward import Reward
from guiderail.guides.scoring.pipeline import Scorers
from guiderail.server.engines.served_engine import ServedEngine
from guiderail.server.keys import Keys
from guiderail.server.metrics import Metrics
from guiderail.server.models.renderer import ChatRenderer
from guiderail.server.requests.admission import Admission
from guiderail.server.requests.resolve import Resolver
from guiderail.server.scoring.batcher import BatchingScorer
from guiderail.server.settings import Settings
from guiderail.server.shutdown import Shutdown
from guiderail.server.workers import Workers


@dataclass(frozen=True, slots=True)
class ServerState:
    """Everything the routes need."""

    settings: Settings
    engine: ServedEngine
    renderer: ChatRenderer
    guides: Mapping[str, type[Guide]]
    rewards: Mapping[str, Reward]
    resolver: Resolver
    scorer: BatchingScorer
    scorers: Scorers
    admission: Admission
    metrics: Metrics
    keys: Keys
    workers: Workers
    created: int
    shutdown: Shutdown = field(default_factory=Shutdown)

    @property
    def lack(self) -> str:
        """What keeps the server from serving requests, or "" if nothing does."""
        if self.shutdown.begun:
            return "shutting down"
        if not self.engine.up:
            return "the engine is down, and being started again"
        if not self.engine.answers:
            return "the engine does not answer"
        down = [name for name, reward in self.rewards.items() if not reward.up]
        return f"down: reward {', '.join(down)}" if down else ""

    @property
    def model_names(self) -> list[str]:
        """What requests may name as their model: model and adapters, and each of them with every profile."""
        bases = [self.settings.model_name, *self.settings.lora]
        return bases + [f"{base}@{profile}" for base in bases for profile in self.resolver.profile_names]

    @property
    def system_fingerprint(self) -> str:
        """OpenAI's field of this name. The engine's dtype is known once it has started."""
        return system_fingerprint(
            self.settings.model_name, self.engine.dtype, batch_invariant=self.settings.batch_invariant
        )


@cache
def system_fingerprint(model: str, dtype: str, *, batch_invariant: bool) -> str:
    """Return what an answer depends on beside its request: model, dtype, versions and mode, for people to read.

    As in `smollm2 float32 guiderail-1.0 vllm-0.32.0 torch-2.13.0 fast`. The mode is `batch-invariant`, or `fast`:
    rounding then depends on what else runs, and a seed promises less.
    """
    parts = [model, dtype, *(f"{name}-{_version(name)}" for name in ("guiderail", "vllm", "torch"))]
    return " ".join([*filter(None, parts), "batch-invariant" if batch_invariant else "fast"])


def _version(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):  # vLLM's CPU build is a distribution of its own
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"
