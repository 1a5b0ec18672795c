"""A request's `alignment`, read once from JSON into frozen specs. Errors are 400s that name the field.

Nothing is looked up here: which guides and rewards there are, and what parameters they take, is for resolve.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, TypeVar

from pydantic import BaseModel, Field, ValidationError

from guiderail.guides.core.types import LARGEST_FACTOR, Fields, NotNamed, read_named
from guiderail.guides.scoring import Chain, ChainError, parse_chain
from guiderail.guides.scoring.calibration import CalibrationSpec
from guiderail.server.openai_errors import bad_request, from_validation

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Budget(Fields):
    """Bounds of one request. On reaching one, the best finished answer so far is returned, marked so."""

    max_tokens_generated: int | None = Field(None, ge=1, description="Tokens over all candidates.")
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="Seconds from arrival to answer; the last 5% (0.3 s at most) are for sending it.",
    )


@dataclass(frozen=True, slots=True)
class NamedSpec:
    """A name with parameters. where: its path in the request."""

    where: str
    name: str
    params: Mapping[str, object]

    OWN: ClassVar[tuple[str, ...]] = ("name",)  # fields of the object that are no parameters

    def among(self, known: Mapping[str, T]) -> T:
        """Return the entry of this name. Raises ApiError (400)."""
        if self.name not in known:
            where = f"{self.where}.name"
            raise bad_request(f"'{where}': no '{self.name}' here; known: {', '.join(sorted(known))}", where)
        return known[self.name]

    def parse(self, model: type[M]) -> M:
        """Return the parameters as `model` has them. Raises ApiError (400)."""
        return read_model(model, self.params, self.where, self.OWN)

    def build(self, models: Mapping[str, type[M]]) -> M:
        """Return an instance of the model that the name is known for. Raises ApiError (400)."""
        return self.parse(self.among(models))


@dataclass(frozen=True, slots=True)
class RewardSpec(NamedSpec):
    """A reward. chain: its transforms; None leaves them to the combination."""

    label: str
    weight: float
    chain: Chain | None

    OWN: ClassVar[tuple[str, ...]] = ("name", "label", "weight", "transform")


@dataclass(frozen=True, slots=True)
class AlignmentSpec:
    """An `alignment`, or the part of it that somebody gave; `given` names its keys. The rest is the built-in default.

    guide: None is best_of_n where there are rewards, and sampling where there are none.
    """

    guide: NamedSpec | None = None
    prompter: NamedSpec = NamedSpec("alignment.prompter", "template", {})
    rewards: tuple[RewardSpec, ...] = ()
    combine: NamedSpec = NamedSpec("alignment.combine", "sum", {})
    select: NamedSpec = NamedSpec("alignment.select", "argmax", {})
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    budget: Budget = field(default_factory=Budget)
    return_candidates: bool = False
    profile: str | None = None
    given: frozenset[str] = frozenset()

    def over(self, base: "AlignmentSpec") -> "AlignmentSpec":
        """Return `base` with each key that is given here in the place of its own; keys are replaced as a whole."""
        return replace(base, **{key: getattr(self, key) for key in self.given})


KEYS = tuple(each.name for each in fields(AlignmentSpec) if each.name != "given")


def read_alignment(value: str | Mapping[str, object] | None) -> AlignmentSpec:
    """Read an alignment object; a string names a profile. Raises ApiError (400)."""
    if isinstance(value, str):
        return AlignmentSpec(profile=value)
    body = {key: each for key, each in (value or {}).items() if each is not None}
    for key in body:
        if key not in KEYS:
            raise bad_request(
                f"unknown field 'alignment.{key}'; allowed: {', '.join(KEYS)}", f"alignment.{key}", "unknown_parameter"
            )

    def part(key: str, read: Callable[[object, str], T], default: T) -> T:
        return read(body[key], f"alignment.{key}") if key in body else default

    base = AlignmentSpec()
    return AlignmentSpec(
        guide=part("guide", read_name, base.guide),
        prompter=part("prompter", read_name, base.prompter),
        rewards=part("rewards", read_rewards, base.rewards),
        combine=part("combine", read_name, base.combine),
        select=part("select", read_name, base.select),
        calibration=part("calibration", read_calibration, base.calibration),
        budget=part("budget", lambda spec, where: read_model(Budget, spec, where), base.budget),
        return_candidates=part("return_candidates", _flag, base.return_candidates),
        profile=part("profile", _text, base.profile),
        given=frozenset(body),
    )


def read_name(value: object, where: str) -> NamedSpec:
    """Read a name with parameters. Raises ApiError (400)."""
    try:
        named = read_named(value)
    except NotNamed as fault:
        if not fault.is_object:
            raise bad_request(f"'{where}' must be a name or an object with one", where) from fault
        where = f"{where}.name"
        if fault.named is None:
            raise bad_request(f"'{where}' is required", where, "missing_required_parameter") from fault
        raise bad_request(f"'{where}' must be a string", where) from fault
    return NamedSpec(where, named.name, named.params)


def read_rewards(value: object, where: str) -> tuple[RewardSpec, ...]:
    """Read a list of rewards. Raises ApiError (400)."""
    if not isinstance(value, list):
        raise bad_request(f"'{where}' must be a list", where)
    return tuple(read_reward(each, f"{where}[{i}]") for i, each in enumerate(value))


def read_reward(value: object, where: str) -> RewardSpec:
    """Read a reward with its label, weight and transforms. Raises ApiError (400)."""
    spec = read_name(value, where)
    params = {key: each for key, each in spec.params.items() if key not in RewardSpec.OWN}
    own = {key: each for key, each in spec.params.items() if each is not None}
    transform = own.get("transform")
    label = _text(own.get("label", spec.name), f"{where}.label")
    weight = _weight(own.get("weight", 1.0), f"{where}.weight")
    try:
        chain = None if transform is None else parse_chain(transform)
    except ChainError as error:
        raise bad_request(f"'{where}.{error.path}': {error.message}", f"{where}.{error.path}") from error
    return RewardSpec(where, spec.name, params, label, weight, chain)


def read_calibration(value: object, where: str) -> CalibrationSpec:
    """Read what transforms are fitted on. Raises ApiError (400)."""
    return read_model(CalibrationSpec, value, where)


def read_model(model: type[M], value: object, where: str, also: tuple[str, ...] = ()) -> M:
    """Read the fields of an object; `also` are further ones that are allowed there. Raises ApiError (400)."""
    if not isinstance(value, Mapping):
        raise bad_request(f"'{where}' must be an object", where)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        names = (info.alias or name for name, info in model.model_fields.items())
        raise from_validation(error, where, (*also, *names)) from error


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise bad_request(f"'{where}' must be a non-empty string", where)
    return value


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise bad_request(f"'{where}' must be true or false", where)
    return value


def _weight(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_FACTOR:
        raise bad_request(f"'{where}' must be a finite number from -{LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}", where)
    return float(value)
