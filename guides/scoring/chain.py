"""Chains: the transforms of one reward in their order, parsed from a request and fitted on its calibration sample.

exp, neg_exp and log act on a quantile, so in a chain they follow calibrated; a chain that starts with one of them
gets calibrated put before it, and shows it. What each step does is in steps.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from guiderail.guides.core.types import NotNamed, Params, read_named
from guiderail.guides.scoring.transforms import (
    AnswerRef,
    Array,
    Calibrated,
    Clip,
    Exp,
    Fitted,
    Identity,
    Log,
    LogSigmoid,
    NegExp,
    Standardize,
    Transform,
    checked,
    default_t,
)

TRANSFORMS: dict[str, type[Transform]] = {
    "identity": Identity,
    "calibrated": Calibrated,
    "exp": Exp,
    "neg_exp": NegExp,
    "log": Log,
    "log_sigmoid": LogSigmoid,
    "clip": Clip,
    "standardize": Standardize,
}
MAX_STEPS = 8


class ChainError(ValueError):
    """A specification is no chain. `path` is the part at fault, such as "transform[1].t"."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


@dataclass(frozen=True, slots=True)
class Chain:
    """Transforms in the order in which they apply; none is the identity. Make one with parse_chain.

    Weakly increasing as a whole: a larger raw value never becomes the smaller one.
    """

    steps: tuple[Transform, ...] = ()

    @property
    def needs_sample(self) -> bool:
        """True if `fit` takes a calibration sample."""
        return any(step.needs_sample for step in self.steps)

    @property
    def reference_answers(self) -> tuple[str, ...]:
        """Texts whose raw values `fit` takes."""
        references = [step.reference for step in self.steps if isinstance(step, LogSigmoid)]
        return tuple(dict.fromkeys(ref.answer for ref in references if isinstance(ref, AnswerRef)))

    def resolved(self, n: int) -> "Chain":
        """The chain with each default t filled in for n candidates (`default_t`)."""
        open_ = [isinstance(step, Exp | NegExp) and step.t is None for step in self.steps]
        fill = {"t": default_t(n)}
        return Chain(tuple(s.model_copy(update=fill) if o else s for s, o in zip(self.steps, open_, strict=True)))

    def fit(self, sample: Array | None, answers: Mapping[str, float]) -> Fitted:
        """The chain as a function from raw values, an array of any shape, to transformed ones, all finite.

        `sample` [M]: raw values of the calibration answers in any order; `answers`: raw values of the reference
        answers by text. Each step is fitted on these as the steps before it transform them.

        Raises ValueError where a sample or reference answer is needed and missing, a t is not resolved, or a value
        is not finite. So does the returned function, for its values.
        """
        here = checked([] if sample is None else sample)
        if here.ndim != 1:
            raise ValueError(f"a calibration sample has one dimension, not {here.ndim}")
        if self.needs_sample and not here.size:
            raise ValueError("a calibration sample is needed")
        texts = self.reference_answers
        if missing := [text for text in texts if text not in answers]:
            raise ValueError(f"the reward of reference answer {missing[0]!r} is needed")
        references = checked([answers[text] for text in texts])
        fitted: list[Fitted] = []
        for step in self.steps:
            apply = step.fit(here, dict(zip(texts, references.tolist(), strict=True)))
            here, references = apply(here), apply(references)
            fitted.append(apply)

        def chain(values: Array) -> Array:
            out = checked(values)
            for apply in fitted:
                out = apply(out)
            return out

        return chain

    def dump(self) -> list[dict[str, object]]:
        """The chain as JSON values that parse_chain turns into the same chain; [] is the identity."""
        return [step.model_dump(mode="json", exclude_none=True) for step in self.steps]


IDENTITY = Chain()


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """A reward and its parameters, the transforms of its values, and its weight in the combination.

    `label` names its values in the response (the reward's name unless the request says otherwise).
    """

    name: str
    label: str
    weight: float
    params: Params
    chain: Chain = IDENTITY


def parse_chain(spec: object, path: str = "transform") -> Chain:
    """The chain that `spec` stands for: None, a transform's name, an object with `name` and parameters, or a list.

    Raises ChainError; its path starts with `path`.
    """
    if spec is None:
        return IDENTITY
    listed = isinstance(spec, list | tuple)
    items: list[object] = list(spec) if isinstance(spec, list | tuple) else [spec]
    if len(items) > MAX_STEPS:
        raise ChainError(path, f"has {len(items)} steps; at most {MAX_STEPS} are allowed")
    steps: list[Transform] = []
    quantile = False
    for i, item in enumerate(items):
        where = f"{path}[{i}]" if listed else path
        step = _parse_step(item, where)
        if isinstance(step, Identity):
            continue
        if step.on_quantile and not quantile:
            if steps:
                raise ChainError(
                    where,
                    f"{step.name} acts on a quantile, which {steps[-1].name} does not leave: "
                    f"put calibrated before {step.name}",
                )
            steps.append(Calibrated())
            quantile = True
        steps.append(step)
        quantile = step.leaves_quantile(quantile)
    return Chain(tuple(steps))


def _parse_step(item: object, where: str) -> Transform:
    known = f"known are {', '.join(TRANSFORMS)}"
    try:
        named = read_named(item)
    except NotNamed as fault:
        if fault.is_object:
            raise ChainError(f"{where}.name", f"must name a transform, not {fault.named!r}; {known}") from fault
        raise ChainError(where, f"must be a transform's name or an object with one, not {item!r}; {known}") from fault
    if named.name not in TRANSFORMS:
        if isinstance(item, str):
            raise ChainError(where, f"unknown transform {item!r}; {known}")
        raise ChainError(f"{where}.name", f"must name a transform, not {named.name!r}; {known}")
    try:
        return TRANSFORMS[named.name].model_validate(named.params)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        loc = [str(part) for part in first["loc"]]
        if loc[:1] == ["reference"]:
            del loc[1:2]  # pydantic's tag for the kind of reference
        raise ChainError(".".join([where, *loc]), first["msg"].removeprefix("Value error, ")) from error
