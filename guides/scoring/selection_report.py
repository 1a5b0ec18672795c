"""The report of an answer's selections: calibration used, KL bound, effective sample size, warnings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from guiderail.guides.core.types import Candidate
from guiderail.guides.scoring.calibration_sample import CalibrationSample
from guiderail.guides.scoring.entropy import effective_sample_size
from guiderail.guides.scoring.over_optimisation import moved_far, over_optimised
from guiderail.guides.scoring.selection.rule import Choice


@dataclass(slots=True)
class SelectionReport:
    """Adds up over the selections of one answer: one for best-of-N, one a step for guides that search.

    `kl` bounds in nats the KL of the answer from the policy (origin.py), or None: not known.
    """

    picks: int = 0
    effective_sample_size: float | None = None
    detail: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, dict[str, str | int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _kl: float | None = None
    _unknown: bool = False

    @property
    def kl(self) -> float | None:
        """The sum over the answer's selections; None if one is not known, or none was reported."""
        return None if self._unknown else self._kl

    @property
    def warnings(self) -> list[str]:
        """All that a user should know, each once."""
        far = moved_far(self.kl)
        return [*([] if far is None else [far]), *self.notes]

    def moved(self, kl: float | None) -> None:
        """Note the choice of a part of the answer, at this KL from the policy. Successive parts add up (chain rule)."""
        self._unknown |= kl is None
        self._kl = (self._kl or 0.0) + (kl or 0.0)

    def calibrated(self, label: str, sample: CalibrationSample) -> None:
        """Note that a reward was calibrated on this sample."""
        self.calibration[label] = {"source": sample.source, "n": len(sample.values)}

    def warn(self, text: str) -> None:
        """Add a warning, once."""
        if text not in self.notes:
            self.notes.append(text)

    def least(self, name: str, value: float) -> None:
        """Note the smallest value so far of a metric of the guide's own."""
        self.detail[name] = min(value, self.detail.get(name, value))

    def picked(self, candidates: Sequence[Candidate], choice: Choice, weights: Mapping[str, float]) -> None:
        """Note a selection. `weights`: rewards' by label."""
        self.picks += 1
        self.moved(choice.kl)
        self.detail |= choice.detail
        if choice.weights is not None:
            size = effective_sample_size(choice.weights)
            self.effective_sample_size = min(size, self.effective_sample_size or size)
        for warning in (*choice.warnings, *over_optimised(candidates, choice.index, weights)):
            self.warn(warning)
