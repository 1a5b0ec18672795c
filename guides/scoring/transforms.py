"""Transforms of one reward's values: the steps that a chain (chain.py) is made of.

A score means little by itself: its unit is the reward model's own. A step turns raw values r into values that can
be compared, summed or sampled over. It is fitted on a calibration sample: values of answers drawn from the base
policy for the same prompt, apart from the candidates.

  identity     r
  calibrated   u = (#{z < r} + #{z = r} / 2) / M over the sample z: the empirical win rate against the base policy
  exp          e^(t u)       for best-of-N: rewards the upper tail
  neg_exp      -e^(-t u)     for worst-of-N, that is, against best-of-N jailbreaks: punishes the lower tail
  log          log max(u, 1 / (2M))     at beta = 1 / (N - 1) its KL-regularised optimum is best-of-N's own
  log_sigmoid  -log(1 + e^(-(r - ref) / temperature))     log P(good), good being preferred to a reference answer
  clip         min(max(r, low), high)
  standardize  (r - mean) / std

InfAlign-CTRL (arXiv 2412.19792): calibrated, exp, neg_exp. Transforming and Combining Rewards (arXiv 2402.00742):
log_sigmoid. No step ever puts a larger value below a smaller one, so transforms alone never change which candidate
has the largest reward (they may make ties); they matter once rewards are summed, sampled over or averaged.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Discriminator, Field, Tag, model_validator

from guiderail.guides.core.types import Fields

Array = npt.NDArray[np.float64]
Fitted = Callable[[Array], Array]

LIMIT = 1e100  # far above any reward, and low enough that squares and weighted sums stay finite
MAX_T = 80.0  # e^80 is still a float32, which the kernel of the same pipeline computes in
Bounded = Annotated[float, Field(ge=-LIMIT, le=LIMIT)]


def default_t(n: int) -> float:
    """The exponent of exp and neg_exp for n candidates: 2.5 n, at most 80.

    Read from integrals over the optimal policies (density ~ e^(transform(u) / beta)): for N = 2, 4, 8, 16, 32 and a
    KL of 0.25 and of 1.0 its best-of-N (worst-of-N) win rate is within 0.01 (0.003) of that of the best t up to 80.
    The best t for best-of-N are 4.1, 10.6, 26, 68, > 80 at KL 0.25 and 5.7, 17, 55, > 80, > 80 at KL 1.0.
    """
    return min(MAX_T, 2.5 * n)


def checked(values: npt.ArrayLike) -> Array:
    """`values` in float64. Raises ValueError where one is NaN, infinite or beyond 1e100."""
    array = np.asarray(values, dtype=np.float64)
    if not (np.abs(array) <= LIMIT).all():
        raise ValueError("rewards must be finite, and at most 1e100 in size")
    return array


def weighted_sum(values: Array, weights: Array | Sequence[float]) -> Array:
    """sum_r weights[r] values[:, r], added up in the same order for every row, so that equal rows stay equal."""
    total = np.zeros(values.shape[0])
    for column, weight in enumerate(weights):
        total += weight * values[:, column]
    return total


class Transform(Fields, ABC):
    """One step of a chain: weakly increasing, finite for finite input."""

    name: str
    on_quantile: ClassVar[bool] = False  # acts on u in [0, 1] alone

    @property
    def needs_sample(self) -> bool:
        """True if fitting takes a calibration sample."""
        return False

    def leaves_quantile(self, given: bool) -> bool:
        """True if what comes out lies in [0, 1] as a quantile does; `given`: if what goes in does."""
        return False

    @abstractmethod
    def fit(self, sample: Array, answers: Mapping[str, float]) -> Fitted:
        """The step as a function on arrays of any shape.

        `sample` [M] and the values of reference `answers` are those that reach this step; the sample is empty where
        the chain needs none.
        """


class Identity(Transform):
    """Leaves the raw value."""

    name: Literal["identity"] = "identity"

    def fit(self, sample: Array, answers: Mapping[str, float]) -> Fitted:
        return lambda x: x


class Calibrated(Transform):
    """Win rate against the base policy's answers to this prompt, ties counting half: a quantile in [0, 1]."""

    name: Literal["calibrated"] = "calibrated"

    @property
    def needs_sample(self) -> bool:
        return True

    def leaves_quantile(self, given: bool) -> bool:
        return True

    def fit(self, sample: Array, answers: Mapping[str, float]) -> Fitted:
        ordered = np.sort(sample)
        return lambda x: (np.searchsorted(ordered, x) + np.searchsorted(ordered, x, side="right")) / (2 * ordered.size)


class _Exponential(Transform, ABC):
    t: float | None = Field(
        default=None, gt=0, le=MAX_T, description="Exponent; the default is 2.5 a candidate, at most 80."
    )
    on_quantile: ClassVar[bool] = True

    def exponent(self) -> float:
        if self.t is None:
            raise ValueError(f"{self.name} has no t yet: resolve the chain for a number of candidates first")
        return self.t


class Exp(_Exponential):
    """e^(t u), which best-of-N wants of a policy: it rewards the upper tail of the quantile u."""

    name: Literal["exp"] = "exp"

    def fit(self, sample: Array, answers: Mapping[str, float]) -> Fitted:
        t = self.exponent()
        return lambda u: np.exp(t * u)


class NegExp(_Exponential):
    """-e^(-t u), which worst-of-N wants of a policy: it punishes the lower tail of the quantile u."""

    name: Literal["neg_exp"] = "neg_exp"

    def fit(self, sample: Array, answers: Mapping[str, float]) -> Fitted:
        t = self.exponent()
        return lambda u: -np.exp(-t * u)


class Log(Transform):
    """log u of the quantile u, floored at 1 / (2M), half of one sample's share."""

    name: Literal["log"] = "log"
    on_quantile: ClassVar[bool] = True

    def fit(self, sample: Array, answers: Mapping[str, float]) -> Fitted:
        floor = 0.5 / sample.size
        return lambda u: np.log(np.maximum(u, floor))


class Quantile(Fields):
    """The reference is a quantile of the calibration sample, linear between samples."""

    quantile: float = Field(gt=0, lt=1, description="Which quantile of the base policy's rewards.")


class Value(Fields):
    """The reference is a number, in the units that reach the step."""

    value: Bounded = Field(description="The reference value.")


class AnswerRef(Fields):
    """The reference is the reward of an answer to the same prompt, such as a refusal."""

    answer: str = Field(min_length=1, description="The reference answer's text.")


def _kind_of_reference(given: object) -> str | None:
    keys = set(given if isinstance(given, Mapping) else getattr(type(given), "model_fields", ()))
    kinds = keys & {"quantile", "value", "answer"}
    return kinds.pop() if len(kinds) == 1 else None


Reference = Annotated[
    Annotated[Quantile, Tag("quantile")] | Annotated[Value, Tag("value")] | Annotated[AnswerRef, Tag("answer")],
    Discriminator(
        _kind_of_reference,
        custom_error_type="reference",
        custom_error_message="must be an object with one of quantile, value and answer",
    ),
]


class LogSigmoid(Transform):
    """log P(good): the Bradley-Terry log-probability of being preferred to the reference."""

    name: Literal["log_sigmoid"] = "log_sigmoid"
    reference: Reference = Field(
        default=Quantile(quantile=0.85), description="What a good answer beats: a quantile, value or answer."
    )
    temperature: float = Field(default=1.0, gt=0, description="Divides the difference; undoes a reward's scaling.")

    @property
    def needs_sample(self) -> bool:
        return isinstance(self.reference, Quantile)

    def fit(self, sample: Array, answers: Mapping[str, float]) -> Fitted:
        match self.reference:
            case Quantile(quantile=q):
                reference = float(np.quantile(sample, q))
            case Value(value=value):
                reference = value
            case AnswerRef(answer=text):
                reference = answers[text]
        return lambda x: -np.logaddexp(0.0, -_scaled(x, reference, self.temperature))


class Clip(Transform):
    """Cuts off below `low` and above `high`."""

    name: Literal["clip"] = "clip"
    low: Bounded | None = Field(default=None, description="Lower bound.")
    high: Bounded | None = Field(default=None, description="Upper bound.")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("clip needs low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("low must not exceed high")
        return self

    def leaves_quantile(self, given: bool) -> bool:
        return given and (self.low is None or self.low <= 1) and (self.high is None or self.high >= 0)

    def fit(self, sample: Array, answers: Mapping[str, float]) -> Fitted:
        low, high = self.low, self.high
        return lambda x: np.minimum(np.maximum(x, -LIMIT if low is None else low), LIMIT if high is None else high)


class Standardize(Transform):
    """(r - mean) / std, both from the sample unless given. A sample without spread is only centred."""

    name: Literal["standardize"] = "standardize"
    mean: Bounded | None = Field(default=None, description="Mean; default: the sample's.")
    std: Bounded | None = Field(default=None, gt=0, description="Standard deviation; default: the sample's.")

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("standardize takes mean and std together, or neither")
        return self

    @property
    def needs_sample(self) -> bool:
        return self.mean is None

    def fit(self, sample: Array, answers: Mapping[str, float]) -> Fitted:
        if self.mean is not None and self.std is not None:
            mean, std = self.mean, self.std
        else:
            mean, std = float(sample.mean()), float(sample.std())
            std = std if np.ptp(sample) > 0 and std > 0 else 1.0
        return lambda x: _scaled(x, mean, std)


def _scaled(x: Array, center: float, scale: float) -> Array:
    with np.errstate(over="ignore"):  # a tiny scale may overflow, always to an infinity with the right sign
        return np.clip((x - center) / scale, -LIMIT, LIMIT)
