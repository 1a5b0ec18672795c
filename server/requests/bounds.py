"""How much of everything one body may have. Counted before it is validated, let alone tokenised: what is refused costs
little, whatever it is. The bounds are the operator's (`limits`), and stand in the API's description.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from guiderail.server.openai_errors import bad_request
from guiderail.server.settings import OperatorLimits

Body = Mapping[str, object]


def check_counts(body: Body, limits: OperatorLimits, context: int) -> None:
    """Raise ApiError (400) that names the first field of the body with too much in it. Wrong types are let through.

    context: the most tokens that the model reads.
    """
    alignment, prompts = body.get("alignment"), body.get("prompt")
    inputs = [each for each in _items(body.get("inputs")) if isinstance(each, Mapping)]
    checks = Checks(limits)
    checks.most("messages", _messages([body]), "max_messages", "messages and parts of contents")
    checks.most("inputs", len(_items(body.get("inputs"))), "max_answers", "inputs")
    checks.most("inputs", _messages(inputs), "max_messages", "messages and parts of contents")
    checks.most("inputs", sum(len(_items(each.get("answers"))) for each in inputs), "max_answers", "answers")
    for number, each in enumerate(inputs):
        for index, answer in enumerate(_items(each.get("answers"))):
            text = answer.get("text") if isinstance(answer, Mapping) else answer
            if isinstance(text, str) and len(text) > limits.max_answer_chars:
                checks.most(f"inputs[{number}].answers[{index}]", len(text), "max_answer_chars", "characters")
    if isinstance(prompts, list) and isinstance(next(iter(prompts), None), int):
        _check_length("prompt", prompts, context)
    elif isinstance(prompts, list):
        checks.most("prompt", len(prompts), "max_candidates", "prompts")
        for number, prompt in enumerate(prompts):
            _check_length(f"prompt[{number}]", prompt, context)
    for field in ("logit_bias", "stop_token_ids"):
        checks.most(field, len(_items(body.get(field))), "max_biased_tokens", "entries")
    checks.most("rewards", len(_items(body.get("rewards"))), "max_rewards", "rewards")
    if isinstance(alignment, Mapping):
        checks.most("alignment.rewards", len(_items(alignment.get("rewards"))), "max_rewards", "rewards")
    for field in ("alignment", "rewards", "combine", "calibration"):
        checks.most(field, _values(body.get(field), limits.max_alignment_values), "max_alignment_values", "values")


def _check_length(field: str, prompt: object, context: int) -> None:
    if isinstance(prompt, list) and len(prompt) >= context:
        message = f"'{field}' has {len(prompt)} tokens; the model's context is {context}, one of which must be left"
        raise bad_request(message, field, "context_length_exceeded")


@dataclass(frozen=True, slots=True)
class Checks:
    """Comparisons with the operator's limits."""

    limits: OperatorLimits

    def most(self, field: str, count: int, setting: str, what: str) -> None:
        """Raise ApiError (400) if the field has more than the limit of this name."""
        if count > (most := getattr(self.limits, setting)):
            message = f"'{field}' has {count} {what} or more; this server allows at most {most} (limits.{setting})"
            raise bad_request(message, field)


def describe_bounds(schemas: Iterable[dict[str, object]], limits: OperatorLimits) -> None:
    """Write the bounds into the JSON schemas of bodies and their parts."""
    bounds: dict[str, tuple[str, int]] = {
        "messages": ("maxItems", limits.max_messages),
        "inputs": ("maxItems", limits.max_answers),
        "answers": ("maxItems", limits.max_answers),
        "rewards": ("maxItems", limits.max_rewards),
        "logit_bias": ("maxProperties", limits.max_biased_tokens),
        "stop_token_ids": ("maxItems", limits.max_biased_tokens),
    }
    for schema in schemas:
        properties = schema.get("properties")
        for name, (keyword, bound) in bounds.items():
            if isinstance(properties, dict) and name in properties:
                properties[name].setdefault(keyword, bound)


def _items(value: object) -> list[object] | dict[str, object]:
    return value if isinstance(value, list | dict) else []


def _messages(holders: Iterable[Body]) -> int:
    """Messages and parts of contents."""
    turns = list(chain.from_iterable(_items(holder.get("messages")) for holder in holders))
    contents: Callable[[object], object] = lambda turn: turn.get("content") if isinstance(turn, Mapping) else None  # noqa: E731
    return len(turns) + sum(len(_items(contents(turn))) for turn in turns)


def _values(value: object, most: int) -> int:
    """The values within a JSON value; counting ends beyond `most`."""
    count, left = 0, [value]
    while left and count <= most:
        if items := _items(left.pop()):
            count += len(items)
            if count <= most:
                left.extend(items.values() if isinstance(items, dict) else items)
    return count
