"""What transforms and selection rules need of the server: calibration samples, sentence embeddings, a judge."""

from collections.abc import Sequence

import numpy as np

from guiderail.guides.core.context import Context
from guiderail.guides.core.reward import Services
from guiderail.guides.core.types import Message
from guiderail.guides.scoring import RewardTerm
from guiderail.guides.scoring.calibration_sample import CalibrationSample
from guiderail.server.engines.served_engine import ServedEngine
from guiderail.server.rewards.models.sentence_embedder import SentenceEmbedder
from guiderail.server.rewards.pairwise_judge import PairwiseJudge
from guiderail.server.scoring.calibrator import Calibrator


class ServerHelpers:
    """guiderail.guides.Helpers over the server's parts."""

    def __init__(
        self, services: Services, engine: ServedEngine, calibrator: Calibrator, encoder: SentenceEmbedder
    ) -> None:
        self.services = services
        self._engine = engine
        self._calibrator = calibrator
        self._encoder = encoder
        self._judge: PairwiseJudge | None = None

    async def sample(self, ctx: Context, term: RewardTerm, length: int | None = None) -> CalibrationSample:
        return await self._calibrator.sample(ctx, term, length)

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        return await self._encoder.embed(texts)

    async def prefer(
        self,
        messages: Sequence[Message],
        criterion: str,
        answers: Sequence[str],
        pairs: Sequence[tuple[int, int]],
    ) -> list[float]:
        if self._judge is None:
            # Question, two answers and the criterion have to fit the context, which only a started engine knows.
            self._judge = PairwiseJudge(self.services, max_tokens=min(512, self._engine.max_model_len // 4))
        return await self._judge.prefer(messages, criterion, answers, pairs)
