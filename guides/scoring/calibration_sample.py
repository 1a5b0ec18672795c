"""Calibration samples of a reward: raw values of answers that the base policy gives to this prompt.

The answers are apart from the candidates: a quantile estimated from the candidates themselves would be
nothing but their rank (InfAlign-CTRL, arXiv 2412.19792). Where the samples come from is the server's business.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.interfaces import Scorer
from guiderail.guides.core.metered_engine import MeteredEngine
from guiderail.guides.scoring.terms import RewardTerm


class CalibrationSpec(BaseModel):
    """A request's `calibration`: which samples transforms that need some are fitted on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["auto", "drawn", "stored", "pooled"] = Field(
        "auto",
        description="drawn: on the fly; stored: the operator's for this prompt; auto: stored where there are such, "
        "else drawn; pooled: stored, or for a prompt that is not among the stored ones those of all of them together.",
    )
    n: int = Field(32, ge=2, le=1024, description="Answers drawn for a prompt that has no pool yet.")


@dataclass(frozen=True, slots=True)
class CalibrationSample:
    """Raw values [M] of one reward under the base policy.

    source: "drawn" for this prompt by this request, "shared" if another request drew them, "stored" for this
    prompt by the operator, or "stored_pooled": the operator's, pooled over other prompts. warnings: what the client
    should know of how the values came about.
    """

    values: tuple[float, ...]
    source: str
    warnings: tuple[str, ...] = ()


class Calibrator(Protocol):
    """Finds what calibrates a reward, or draws it."""

    async def sample(
        self,
        dialogue: Dialogue,
        engine: MeteredEngine,
        scorer: Scorer,
        term: RewardTerm,
        spec: CalibrationSpec,
        length: int | None = None,
    ) -> CalibrationSample:
        """Raw values of the reward, of answers that the dialogue's policy gives. Raises RewardFailed, DeadlinePassed.

        length: of these answers cut after so many tokens, which partial answers of that length compare with.
        """
        ...
