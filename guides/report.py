"""What is reported of an answer's selection: calibration used, KL estimate, effective sample size, warnings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guiderail.guides.calibration import CalibrationSample
from guiderail.guides.pipeline import Choice, effective_sample_size, over_optimised
from guiderail.guides.types import Candidate


@dataclass(slots=True)
class SelectionReport:
    """Adds up over the selections of one answer: one for best-of-N, one a step for guides that search."""

    kl: float = 0.0
    picks: int = 0
    effective_sample_size: float | None = None
    detail: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def calibrated(self, label: str, sample: CalibrationSample) -> None:
        """A reward was calibrated on this sample."""
        self.calibration[label] = {"source": sample.source, "n": len(sample.values)}

    def warn(self, text: str) -> None:
        """Adds a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def least(self, name: str, value: float) -> None:
        """Notes the smallest value so far of a figure of the guide's own."""
        self.detail[name] = min(value, self.detail.get(name, value))

    def picked(self, candidates: Sequence[Candidate], choice: Choice, weights: Mapping[str, float]) -> None:
        """A selection was made. The KL of successive selections adds up (chain rule). `weights`: rewards' by label."""
        self.picks += 1
        self.kl += choice.kl
        self.detail |= choice.detail
        if choice.weights is not None:
            size = effective_sample_size(choice.weights)
            self.effective_sample_size = min(size, self.effective_sample_size or size)
        for warning in over_optimised(candidates, choice, weights):
            self.warn(warning)
