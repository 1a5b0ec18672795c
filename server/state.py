"""The parts of a running server. One frozen object, handed to the routes; there are no globals."""

from collections.abc import Mapping
from dataclasses import dataclass

from guiderail.guides.core.guide import Guide
from guiderail.guides.core.reward import Reward
from guiderail.guides.scoring.pipeline import Scorers
from guiderail.server.engines.served_engine import ServedEngine
from guiderail.server.metrics import Metrics
from guiderail.server.models.renderer import ChatRenderer
from guiderail.server.requests.admission import Admission
from guiderail.server.requests.resolve import Resolver
from guiderail.server.scoring.batcher import BatchingScorer
from guiderail.server.settings import Settings
from guiderail.server.system_fingerprint import system_fingerprint


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
    created: int

    @property
    def system_fingerprint(self) -> str:
        """OpenAI's field of this name. The engine's dtype is known once it has started."""
        return system_fingerprint(
            self.settings.model_name, self.engine.dtype, batch_invariant=self.settings.batch_invariant
        )
