"""The alignment object of a request: server default < named profile < request, within the operator's limits.

Resolving gives a frozen `Alignment`, checked down to the parameters of each guide and reward, which is
echoed in the response. Whole top-level keys are replaced: a request that names `rewards` replaces the
profile's rewards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guiderail.guides.base import Guide
from guiderail.guides.pipeline import Argmax, RewardTerm, Selection, Softmax
from guiderail.guides.reward import Reward, Services
from guiderail.server.errors import bad_request, from_validation
from guiderail.server.settings import OperatorLimits

SELECTIONS: dict[str, type[Argmax] | type[Softmax]] = {"argmax": Argmax, "softmax": Softmax}
KEYS = ("guide", "rewards", "combine", "select", "budget", "return_candidates")


class Budget(BaseModel):
    """Bounds of one request. On reaching one, the best finished answer so far is returned, marked so."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_tokens_generated: int | None = Field(None, ge=1, description="Tokens over all candidates.")
    deadline_s: float | None = Field(None, gt=0, description="Seconds from the request's arrival.")


@dataclass(frozen=True, slots=True)
class Alignment:
    """A resolved alignment: everything is checked, nothing is left to defaults."""

    guide_name: str
    guide: Guide
    rewards: tuple[RewardTerm, ...]
    selection: Selection
    budget: Budget
    return_candidates: bool

    def echo(self) -> dict[str, Any]:
        """The configuration as the response shows it, and as a request could send it."""
        return {
            "guide": {"name": self.guide_name, **self.guide.params.model_dump(mode="json", by_alias=True)},
            "rewards": [
                {
                    "name": t.name,
                    "label": t.label,
                    "weight": t.weight,
                    **t.params.model_dump(mode="json", by_alias=True),
                }
                for t in self.rewards
            ],
            "combine": "sum",
            "select": self.selection.model_dump(mode="json"),
            "budget": self.budget.model_dump(mode="json"),
            "return_candidates": self.return_candidates,
        }


class Resolver:
    """Resolves alignments against what the server has loaded and what its operator allows."""

    def __init__(
        self,
        guides: Mapping[str, type[Guide]],
        rewards: Mapping[str, Reward],
        services: Services,
        default: Mapping[str, Any],
        profiles: Mapping[str, Mapping[str, Any]],
        limits: OperatorLimits,
    ) -> None:
        """Checks the default and every profile at once; raises ApiError naming the faulty one."""
        self._guides = guides
        self._rewards = rewards
        self._services = services
        self._default = dict(default)
        self._profiles = {name: dict(profile) for name, profile in profiles.items()}
        self._limits = limits
        self._required = tuple(
            self._reward(spec, f"limits.required_rewards[{i}]") for i, spec in enumerate(limits.required_rewards)
        )
        self.resolve(None)
        for name in self._profiles:
            self.resolve(name)

    @property
    def profile_names(self) -> list[str]:
        """Names that `alignment` or a model name's @suffix may give."""
        return sorted(self._profiles)

    def resolve(self, requested: str | Mapping[str, Any] | None, profile: str | None = None) -> Alignment:
        """The alignment of a request. `profile` comes from the model name's suffix.

        Raises ApiError (400) that names the field and what is allowed.
        """
        if isinstance(requested, str):
            if profile is not None and profile != requested:
                raise bad_request(f"the model name says profile '{profile}', alignment says '{requested}'", "alignment")
            profile, requested = requested, None
        body = dict(requested or {})
        profile = (
            self._text(body.pop("profile", profile), "alignment.profile") if "profile" in body or profile else None
        )
        merged = {**self._default, **self._profile(profile), **body}
        for key in merged:
            if key not in KEYS:
                allowed = ", ".join((*KEYS, "profile"))
                raise bad_request(
                    f"unknown field 'alignment.{key}'; allowed: {allowed}", f"alignment.{key}", "unknown_parameter"
                )
        terms = self.terms(merged.get("rewards") or [], "alignment.rewards")
        guide_name, guide = self._guide(merged.get("guide"), bool(terms))
        if self._required and not guide.steers:
            names = ", ".join(term.name for term in self._required)
            raise bad_request(
                f"this server requires the rewards {names}, and guide '{guide_name}' does not use rewards to steer",
                "alignment.guide.name",
            )
        if guide.steers and not terms:
            raise bad_request(
                f"guide '{guide_name}' needs at least one reward; known: {', '.join(sorted(self._rewards))}",
                "alignment.rewards",
                "missing_required_parameter",
            )
        if merged.get("combine", "sum") not in ("sum", {"name": "sum"}):
            raise bad_request("'alignment.combine' must be 'sum'", "alignment.combine")
        return Alignment(
            guide_name, guide, terms, self._selection(merged.get("select", "argmax")),
            self._budget(merged.get("budget") or {}), self._flag(merged.get("return_candidates", False)),
        )  # fmt: skip

    def _profile(self, name: str | None) -> dict[str, Any]:
        if name is None:
            return {}
        if name not in self._profiles:
            known = ", ".join(self.profile_names) or "none configured"
            raise bad_request(f"no alignment profile '{name}'; known: {known}", "alignment")
        return self._profiles[name]

    def _guide(self, spec: Any, with_rewards: bool) -> tuple[str, Guide]:
        if spec is None:  # rewards alone mean "choose by them"; nothing at all means plain sampling
            spec = "best_of_n" if with_rewards else "sampling"
        name, rest = self._named(spec, "alignment.guide", self._guides)
        cls = self._guides[name]
        return name, cls(_parse(cls.Params, rest, "alignment.guide"))

    def terms(self, specs: Any, where: str = "rewards") -> tuple[RewardTerm, ...]:
        """The rewards of a list of specs, with those that the operator requires. Raises ApiError (400)."""
        if not isinstance(specs, list):
            raise bad_request(f"'{where}' must be a list", where)
        asked = [self._reward(spec, f"{where}[{i}]") for i, spec in enumerate(specs)]
        required = {term.name for term in self._required}
        terms = (*self._required, *(term for term in asked if term.name not in required))
        labels = [term.label for term in terms]
        for i, label in enumerate(labels):
            if label in labels[:i]:
                raise bad_request(f"two rewards are labelled '{label}'; give each a 'label' of its own", where)
        return terms

    def _reward(self, spec: Any, where: str) -> RewardTerm:
        name, rest = self._named(spec, where, self._rewards)
        label = self._text(rest.pop("label", name), f"{where}.label")
        weight = rest.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            raise bad_request(f"'{where}.weight' must be a finite number", f"{where}.weight")
        reward = self._rewards[name]
        params = _parse(reward.Params, rest, where, ("label", "weight"))
        try:
            reward.check(params, self._services)
        except ValueError as error:
            raise bad_request(f"'{where}': {error}", where) from error
        return RewardTerm(name, label, float(weight), params)

    def _selection(self, spec: Any) -> Selection:
        name, rest = self._named(spec, "alignment.select", SELECTIONS)
        selection: Selection = _parse(SELECTIONS[name], rest, "alignment.select")
        return selection

    def _budget(self, spec: Any) -> Budget:
        if not isinstance(spec, dict):
            raise bad_request("'alignment.budget' must be an object", "alignment.budget")
        budget: Budget = _parse(Budget, spec, "alignment.budget")
        longest = self._limits.max_deadline_s
        if longest is None:
            return budget
        if budget.deadline_s is not None and budget.deadline_s > longest:
            where = "alignment.budget.deadline_s"
            raise bad_request(f"'{where}' is {budget.deadline_s}; this server allows at most {longest}", where)
        return budget.model_copy(update={"deadline_s": budget.deadline_s or longest})

    @staticmethod
    def _named(spec: Any, where: str, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Splits {"name": ..., parameters} (or a bare name) and checks the name."""
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, dict):
            raise bad_request(f"'{where}' must be a name or an object with one", where)
        rest = dict(spec)
        name = rest.pop("name", None)
        if name is None:
            raise bad_request(f"'{where}.name' is required", f"{where}.name", "missing_required_parameter")
        if not isinstance(name, str) or name not in known:
            raise bad_request(f"'{where}.name': no '{name}' here; known: {', '.join(sorted(known))}", f"{where}.name")
        return name, rest

    @staticmethod
    def _text(value: Any, where: str) -> str:
        if not isinstance(value, str) or not value:
            raise bad_request(f"'{where}' must be a non-empty string", where)
        return value

    @staticmethod
    def _flag(value: Any) -> bool:
        if not isinstance(value, bool):
            raise bad_request("'alignment.return_candidates' must be true or false", "alignment.return_candidates")
        return value


def _parse(model: type[BaseModel], values: dict[str, Any], where: str, also: tuple[str, ...] = ()) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise from_validation(
            error, where, ("name", *also, *(info.alias or name for name, info in model.model_fields.items()))
        ) from error
