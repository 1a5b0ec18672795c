"""The alignment object of a request: server default < named profile < request, within the operator's limits.

Resolving gives a frozen `Alignment`, checked down to the parameters of each guide and reward, which is
echoed in the response. Whole top-level keys are replaced: a request that names `rewards` replaces the
profile's rewards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from guiderail.guides.core.guide import Guide
from guiderail.guides.core.reward import Reward, Services
from guiderail.guides.prompters import PROMPTERS, Prompter
from guiderail.guides.scoring import (
    COMBINES,
    IDENTITY,
    POOL_KINDS,
    SELECTIONS,
    Chain,
    ChainError,
    Combine,
    RewardTerm,
    Selection,
    parse_chain,
)
from guiderail.guides.scoring.calibration_sample import CalibrationSpec
from guiderail.server.openai_errors import bad_request
from guiderail.server.requests.parsing import flag, named, number, parse, text
from guiderail.server.settings import OperatorLimits

KEYS = ("guide", "prompter", "rewards", "combine", "select", "calibration", "budget", "return_candidates")


class Budget(BaseModel):
    """Bounds of one request. On reaching one, the best finished answer so far is returned, marked so."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_tokens_generated: int | None = Field(None, ge=1, description="Tokens over all candidates.")
    deadline_s: float | None = Field(
        None, gt=0, description="Seconds from arrival to answer; the last 5% (0.3 s at most) are for sending it."
    )


@dataclass(frozen=True, slots=True)
class Alignment:
    """A resolved alignment: everything is checked, nothing is left to defaults."""

    guide_name: str
    guide: Guide
    prompter: Prompter
    rewards: tuple[RewardTerm, ...]
    combine: Combine
    selection: Selection
    calibration: CalibrationSpec
    budget: Budget
    return_candidates: bool

    def echo(self) -> dict[str, Any]:
        """The configuration as the response shows it, and as a request could send it."""
        return {
            "guide": {"name": self.guide_name, **self.guide.params.model_dump(mode="json", by_alias=True)},
            "prompter": self.prompter.dump(),
            "rewards": [
                {
                    "name": t.name,
                    "label": t.label,
                    "weight": t.weight,
                    "transform": t.chain.dump(),
                    **t.params.model_dump(mode="json", by_alias=True),
                }
                for t in self.rewards
            ],
            "combine": self.combine.model_dump(mode="json"),
            "select": self.selection.model_dump(mode="json"),
            "calibration": self.calibration.model_dump(mode="json"),
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
        prompters: Mapping[str, type[Prompter]] = PROMPTERS,
    ) -> None:
        """Checks the default and every profile at once; raises ApiError naming the faulty one."""
        self._guides = guides
        self._rewards = rewards
        self._services = services
        self._default = dict(default)
        self._profiles = {name: dict(profile) for name, profile in profiles.items()}
        self._limits = limits
        self._prompters = prompters
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
        profile = text(body.pop("profile", profile), "alignment.profile") if "profile" in body or profile else None
        merged = {**self._default, **self._profile(profile), **body}
        for key in merged:
            if key not in KEYS:
                allowed = ", ".join((*KEYS, "profile"))
                raise bad_request(
                    f"unknown field 'alignment.{key}'; allowed: {allowed}", f"alignment.{key}", "unknown_parameter"
                )
        specs = merged.get("rewards") or []
        guide_name, guide = self._guide(merged.get("guide"), bool(specs or self._required))
        terms, combine = self.pipeline(specs, merged.get("combine", "sum"), guide.candidates(), "alignment.")
        if self._required and not guide.steers:
            names = ", ".join(term.name for term, _ in self._required)
            raise bad_request(
                f"this server requires the rewards {names}, and guide '{guide_name}' does not use rewards to steer",
                "alignment.guide.name",
            )
        if guide.steers and guide.needs_rewards and not any(term.weight for term in terms):
            raise bad_request(
                f"guide '{guide_name}' needs at least one reward; known: {', '.join(sorted(self._rewards))}",
                "alignment.rewards",
                "missing_required_parameter",
            )
        selection = self._selection(merged.get("select", "argmax"), guide_name, guide)
        return Alignment(
            guide_name, guide, self._prompter(merged.get("prompter", "template")), terms, combine, selection,
            parse(CalibrationSpec, merged.get("calibration", {}), "alignment.calibration"),
            self._budget(merged.get("budget") or {}),
            flag(merged.get("return_candidates", False), "alignment.return_candidates"),
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
        name, rest = named(spec, "alignment.guide", self._guides)
        cls = self._guides[name]
        guide = cls(parse(cls.Params, rest, "alignment.guide", ("name",)))
        try:
            guide.check(self._services)
        except ValueError as error:
            raise bad_request(f"'alignment.guide': {error}", "alignment.guide") from error
        return name, guide

    def pipeline(
        self, specs: Any, combine: Any, candidates: int, where: str = ""
    ) -> tuple[tuple[RewardTerm, ...], Combine]:
        """The rewards of a list of specs, with those that the operator requires, and how they are combined.

        `candidates` fills transforms' defaults that depend on it. Raises ApiError (400).
        """
        name, rest = named(combine, f"{where}combine", COMBINES)
        rule: Combine = parse(COMBINES[name], rest, f"{where}combine", ("name",))
        if not isinstance(specs, list):
            raise bad_request(f"'{where}rewards' must be a list", f"{where}rewards")
        asked = [self._reward(spec, f"{where}rewards[{i}]") for i, spec in enumerate(specs)]
        required = {term.name for term, _ in self._required}
        every = (*self._required, *((term, chain) for term, chain in asked if term.name not in required))
        terms = tuple(
            replace(term, chain=(chain or rule.default_chain or IDENTITY).resolved(candidates)) for term, chain in every
        )
        labels = [term.label for term in terms]
        for i, label in enumerate(labels):
            if label in labels[:i]:
                raise bad_request(
                    f"two rewards are labelled '{label}'; give each a 'label' of its own", f"{where}rewards"
                )
        try:
            if terms:
                used = [term for term in terms if term.weight]
                rule.check([t.label for t in used], [t.chain for t in used], [t.weight for t in used])
        except ValueError as error:
            raise bad_request(f"'{where}combine': {error}", f"{where}combine") from error
        return terms, rule

    def _reward(self, spec: Any, where: str) -> tuple[RewardTerm, Chain | None]:
        """A reward and the transforms asked for; None leaves them to the combination."""
        name, rest = named(spec, where, self._rewards)
        label = text(rest.pop("label", name), f"{where}.label")
        weight = number(rest.pop("weight", 1.0), f"{where}.weight")
        transform = rest.pop("transform", None)
        try:
            chain = None if transform is None else parse_chain(transform)
        except ChainError as error:
            raise bad_request(f"'{where}.{error.path}': {error.message}", f"{where}.{error.path}") from error
        reward = self._rewards[name]
        params = parse(reward.Params, rest, where, ("name", "label", "weight", "transform"))
        try:
            reward.check(params, self._services)
        except ValueError as error:
            raise bad_request(f"'{where}': {error}", where) from error
        return RewardTerm(name, label, weight, params), chain

    def _prompter(self, spec: Any) -> Prompter:
        name, rest = named(spec, "alignment.prompter", self._prompters)
        prompter: Prompter = parse(self._prompters[name], rest, "alignment.prompter", ("name",))
        try:
            prompter.check(self._services)
        except ValueError as error:
            raise bad_request(f"'alignment.prompter': {error}", "alignment.prompter") from error
        return prompter

    @staticmethod
    def _selection(spec: Any, guide_name: str, guide: Guide) -> Selection:
        name, rest = named(spec, "alignment.select", SELECTIONS)
        selection: Selection = parse(SELECTIONS[name], rest, "alignment.select", ("name",))
        if not guide.steers:
            return selection
        pools = guide.pools()
        made = ", ".join(POOL_KINDS[kind] for kind in pools if kind not in selection.valid_for)
        if not pools and guide.needs_rewards and selection.valid_for < set(POOL_KINDS):
            made = "pools of a kind that it does not declare (Guide.pools)"
        if made:
            allowed = [each for each, rule in sorted(SELECTIONS.items()) if rule.valid_for >= set(pools or POOL_KINDS)]
            raise bad_request(
                f"'{name}' cannot choose for guide '{guide_name}', which makes {made} with these parameters; "
                f"allowed with it: {', '.join(allowed)}",
                "alignment.select",
            )
        try:
            for candidates in pools.values():
                selection.check(candidates)
        except ValueError as error:
            raise bad_request(f"'alignment.select': {error}", "alignment.select") from error
        return selection

    def _budget(self, spec: Any) -> Budget:
        budget: Budget = parse(Budget, spec, "alignment.budget")
        longest = self._limits.max_deadline_s
        if longest is None:
            return budget
        if budget.deadline_s is not None and budget.deadline_s > longest:
            where = "alignment.budget.deadline_s"
            raise bad_request(f"'{where}' is {budget.deadline_s}; this server allows at most {longest}", where)
        return budget.model_copy(update={"deadline_s": budget.deadline_s or longest})
