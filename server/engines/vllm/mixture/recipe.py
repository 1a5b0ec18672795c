"""Recipe of a mixture: what vLLM's processes must know of a sequence that belongs to one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MIX = "guiderail_mix"  # key of SamplingParams.extra_args


@dataclass(frozen=True, slots=True)
class Recipe:
    """A sequence's place in its group, for the scheduler and the logits processors.

    group: name shared by the sequences of one answer, `size` of them. role: number of the policy, 0 for the prompt's
    own. replay: tokens that the sequence emits first, whatever its logits. The rest is given for role 0 alone;
    weights: of roles 1, 2, ...
    """

    group: str
    role: int
    size: int
    replay: Sequence[int] = ()
    weights: Sequence[float] = ()
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    plausibility: float = 0.0

    def extra_args(self) -> dict[str, Any]:
        """Return the recipe for SamplingParams."""
        return {MIX: asdict(self) | {"replay": list(self.replay), "weights": list(self.weights)}}

    @staticmethod
    def of(extra_args: Mapping[str, Any] | None) -> "Recipe | None":
        """Return the recipe in SamplingParams.extra_args, None for a sequence that is in no group."""
        return Recipe(**extra_args[MIX]) if extra_args and MIX in extra_args else None
