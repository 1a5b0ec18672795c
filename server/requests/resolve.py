"""The alignment that a request comes to: server default < named profile < request, within the operator's limits.

Resolving gives a frozen `Alignment`, checked down to the parameters of each guide and reward, which is
echoed in the response. Whole top-level keys are replaced: a request that names `rewards` replaces the
profile's rewards.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from guiderail.guides.core.guide import Guide
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.reward import Reward
from guiderail.guides.prompters import PROMPTERS, Prompter
from guiderail.guides.scoring import (
    COMBINES,
    IDENTITY,
    POOL_KINDS,
    SELECTIONS,
    Chain,
    Combine,
    RewardTerm,
    Selection,
)
from guiderail.guides.scoring.calibration import CalibrationSpec
from guiderail.server.openai_errors import bad_request
from guiderail.server.requests.specs import (
    AlignmentSpec,
    Budget,
    NamedSpec,
    RewardSpec,
    read_alignment,
    read_rewards,
)
from guiderail.server.settings import OperatorLimits


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

    def echo(self) -> dict[str, object]:
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
        default: Mapping[str, object],
        profiles: Mapping[str, Mapping[str, object]],
        limits: OperatorLimits,
        prompters: Mapping[str, type[Prompter]] = PROMPTERS,
    ) -> None:
        """Check the default and every profile at once. Raises ApiError naming the faulty field."""
        self._guides = guides
        self._rewards = rewards
        self._services = services
        self._default = _configured(default)
        self._profiles = {name: _configured(profile) for name, profile in profiles.items()}
        self._limits = limits
        self._prompters = prompters
        required = read_rewards(limits.required_rewards, "limits.required_rewards")
        self._required = tuple((self._term(spec), spec.chain) for spec in required)
        self.resolve(AlignmentSpec())
        for name in self._profiles:
            self.resolve(AlignmentSpec(profile=name))

    @property
    def profile_names(self) -> list[str]:
        """Names that `alignment` or a model name's @suffix may give."""
        return sorted(self._profiles)

    def resolve(self, asked: AlignmentSpec, suffix: str | None = None) -> Alignment:
        """Merge and check what a request asks for. suffix: the profile that the model's name gives.

        Raises ApiError (400) that names the field and what is allowed.
        """
        if not asked.given and asked.profile is not None and suffix not in (None, asked.profile):
            raise bad_request(f"the model name says profile '{suffix}', alignment says '{asked.profile}'", "alignment")
        spec = asked.over(self._profile(asked.profile or suffix).over(self._default))
        guide_name, guide = self._guide(spec)
        own = "rewards" in asked.given
        terms, combine = self.pipeline(spec.rewards, spec.combine, guide.candidates(), "alignment.rewards", own=own)
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
        return Alignment(
            guide_name, guide, self._prompter(spec.prompter), terms, combine,
            self._selection(spec.select, guide_name, guide), spec.calibration, self._budget(spec.budget),
            spec.return_candidates,
        )  # fmt: skip

    def _profile(self, name: str | None) -> AlignmentSpec:
        if name is None:
            return AlignmentSpec()
        if name not in self._profiles:
            known = ", ".join(self.profile_names) or "none configured"
            raise bad_request(f"no alignment profile '{name}'; known: {known}", "alignment")
        return self._profiles[name]

    def _guide(self, spec: AlignmentSpec) -> tuple[str, Guide]:
        named = spec.guide
        if named is None:  # rewards alone mean "choose by them"; nothing at all means plain sampling
            with_rewards = bool(spec.rewards or self._required)
            named = NamedSpec("alignment.guide", "best_of_n" if with_rewards else "sampling", {})
        cls = named.among(self._guides)
        guide = cls(named.parse(cls.Params))
        with _refused("alignment.guide"):
            guide.check(self._services)
        return named.name, guide

    def pipeline(
        self,
        specs: Sequence[RewardSpec],
        combine: NamedSpec,
        candidates: int,
        where: str = "rewards",
        *,
        own: bool = True,
    ) -> tuple[tuple[RewardTerm, ...], Combine]:
        """Return the rewards asked for with those that the operator requires, and how they are combined.

        where: the path of the rewards. candidates: fills transforms' defaults that depend on it. own: the request names
        the rewards itself, so that one under the name of a required one must be the same; a profile's gives way. Raises
        ApiError.
        """
        rule = combine.build(COMBINES)

        def complete(term: RewardTerm, chain: Chain | None) -> RewardTerm:
            return replace(term, chain=(chain or rule.default_chain or IDENTITY).resolved(candidates))

        required = {term.name: complete(term, chain) for term, chain in self._required}
        terms = tuple(required.values())
        for spec in specs:
            term = complete(self._term(spec), spec.chain)
            if term.name not in required:
                terms += (term,)
            elif own and term != required[term.name]:  # the same one is an echo of ours
                raise bad_request(
                    f"'{spec.where}': this server requires the reward '{term.name}' with a label, weight, "
                    "transform and parameters of its operator's; leave it out",
                    spec.where,
                )
        labels = [term.label for term in terms]
        for i, label in enumerate(labels):
            if label in labels[:i]:
                raise bad_request(f"two rewards are labelled '{label}'; give each a 'label' of its own", where)
        if terms:
            used = [term for term in terms if term.weight]
            with _refused(combine.where):
                rule.check([t.label for t in used], [t.chain for t in used], [t.weight for t in used])
        return terms, rule

    def _term(self, spec: RewardSpec) -> RewardTerm:
        """The reward, with no transform yet."""
        reward = spec.among(self._rewards)
        params = spec.parse(reward.Params)
        with _refused(spec.where):
            reward.check(params, self._services)
        return RewardTerm(spec.name, spec.label, spec.weight, params)

    async def vet(self, rewards: Sequence[RewardTerm], owner: str, where: str = "alignment.rewards") -> None:
        """Have the rewards that a request asks for refuse what only work on it shows to be wrong. Raises ApiError."""
        for i, term in enumerate(rewards[len(self._required) :]):  # the operator's come first
            with _refused(f"{where}[{i}]"):
                await self._rewards[term.name].vet(term.params, owner)

    async def vet_configured(self) -> None:
        """Have the rewards of the default, the profiles and the limits vetted. Raises ApiError naming the field."""
        for term, _ in self._required:
            with _refused("limits.required_rewards"):
                await self._rewards[term.name].vet(term.params)
        for name in (None, *self._profiles):
            await self.vet(self.resolve(AlignmentSpec(profile=name)).rewards, "")

    def _prompter(self, spec: NamedSpec) -> Prompter:
        prompter = spec.build(self._prompters)
        with _refused(spec.where):
            prompter.check(self._services)
        return prompter

    @staticmethod
    def _selection(spec: NamedSpec, guide_name: str, guide: Guide) -> Selection:
        selection = spec.build(SELECTIONS)
        if not guide.steers:
            return selection
        pools = guide.pools()
        made = ", ".join(POOL_KINDS[kind] for kind in pools if kind not in selection.valid_for)
        if not pools and guide.needs_rewards and selection.valid_for < set(POOL_KINDS):
            made = "pools of a kind that it does not declare (Guide.pools)"
        if made:
            allowed = [each for each, rule in sorted(SELECTIONS.items()) if rule.valid_for >= set(pools or POOL_KINDS)]
            raise bad_request(
                f"'{spec.name}' cannot choose for guide '{guide_name}', which makes {made} with these parameters; "
                f"allowed with it: {', '.join(allowed)}",
                "alignment.select",
            )
        with _refused("alignment.select"):
            for candidates in pools.values():
                selection.check(candidates)
        return selection

    def _budget(self, budget: Budget) -> Budget:
        longest = self._limits.max_deadline_s
        if longest is None:
            return budget
        if budget.deadline_s is not None and budget.deadline_s > longest:
            where = "alignment.budget.deadline_s"
            raise bad_request(f"'{where}' is {budget.deadline_s}; this server allows at most {longest}", where)
        return budget.model_copy(update={"deadline_s": budget.deadline_s or longest})


def _configured(value: Mapping[str, object]) -> AlignmentSpec:
    """Read an alignment that the operator wrote; it cannot build on a profile."""
    spec = read_alignment(value)
    if "profile" in spec.given:
        raise bad_request("'alignment.profile' is for requests", "alignment.profile", "unknown_parameter")
    return spec


@contextmanager
def _refused(where: str) -> Iterator[None]:
    """Raise what is a ValueError in the block as an ApiError (400) that names the field."""
    try:
        yield
    except ValueError as error:
        raise bad_request(f"'{where}': {error}", where) from error
