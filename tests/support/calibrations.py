"""A stored calibration of the reward LastDigit, and a Calibrator over such."""

from pathlib import Path
from typing import Any

from guiderail.guides.core.context import Context
from guiderail.guides.core.types import TokenPrompt
from guiderail.guides.scoring import RewardTerm
from guiderail.guides.scoring.calibration import CalibrationSample
from guiderail.server.metrics import Metrics
from guiderail.server.scoring import calibration_file as calibration_store
from guiderail.server.scoring.calibration_file import StoredCalibration, prompt_key
from guiderail.server.scoring.calibrator import Calibrator

PROMPT = TokenPrompt((1, 2))


def write(path: Path, **more: Any) -> Path:
    values = {prompt_key(PROMPT): [1.0, 2.0, 3.0], prompt_key(TokenPrompt((9,))): [10.0, 20.0, 30.0]}
    fields: dict[str, Any] = {
        "model": "m", "model_revision": "rev", "reward": "last_digit", "reward_revision": "1", "params": "{}",
        "sampling": {"max_tokens": 50},
    }  # fmt: skip
    calibration_store.save(path, values, **(fields | more))
    return path


class OfContexts(Calibrator):
    """A Calibrator that takes what it needs from a Context."""

    async def of(self, ctx: Context, term: RewardTerm, length: int | None = None) -> CalibrationSample:
        pipeline = ctx.pipeline
        return await self.sample(
            ctx.dialogue, ctx.engine, pipeline._scorers.scorer, term, pipeline.asked.calibration, length
        )


def calibrator(*stored: StoredCalibration, **more: Any) -> OfContexts:
    return OfContexts(stored, Metrics("fake"), **more)
