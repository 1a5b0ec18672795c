"""Rewards that are rules over the answer's text: keywords, length, regular expression, JSON schema.

Patterns and schemas come from requests, so they run with a time limit and never fetch anything.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

import regex
from jsonschema import Draft202012Validator, SchemaError
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from pydantic import Field
from referencing import Registry
from referencing.exceptions import Unresolvable

from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.reward import TextReward
from guiderail.guides.core.types import Params
from guiderail.server.strict_json import JsonFault, parse_json

PATTERN_TIMEOUT_S = 0.1  # per search; a pattern can take exponential time
STOP_WORDS = frozenset(
    """
    about after also because been before being both could does doing down each else ever from have
    having here into just like make many more most much must only other ought over please same should
    some such than that their them then there these they this those through under until very want were
    what when where which while whom whose will with would write your yours
    """.split()  # noqa: SIM905
)


class KeywordsParams(Params):
    words: list[str] = Field(
        default=[], max_length=256, description="Words or phrases to cover; empty: content words of the question."
    )
    match: Literal["word", "prefix"] = Field(
        default="word", description="'prefix' also accepts longer forms: 'run' is covered by 'running'."
    )
    case_sensitive: bool = False


class Keywords(TextReward[KeywordsParams]):
    """Fraction of the given words that the answer contains (by default the question's own content words)."""

    Params = KeywordsParams

    def check(self, params: KeywordsParams, services: Services) -> None:
        if any(not word.strip() for word in params.words):
            raise ValueError("'words' must not contain empty words")

    def score_text(self, prompt: str, answer: str, params: KeywordsParams) -> float:
        words = params.words or content_words(prompt)
        if not words:
            return 0.0
        flags = 0 if params.case_sensitive else re.IGNORECASE
        end = r"(?!\w)" if params.match == "word" else ""
        found = (re.search(rf"(?<!\w){re.escape(word.strip())}{end}", answer, flags) is not None for word in words)
        return sum(found) / float(len(words))


def content_words(text: str) -> list[str]:
    """Return the distinct lower-case words of at least four letters that are not stop words, in order."""
    words = (word.lower() for word in re.findall(r"[^\W\d_]{4,}", text))
    return list(dict.fromkeys(word for word in words if word not in STOP_WORDS))


class LengthParams(Params):
    target: int = Field(default=60, ge=1, le=1_000_000, description="Wanted length, in `unit`s.")
    unit: Literal["words", "characters", "sentences"] = "words"


class Length(TextReward[LengthParams]):
    """Closeness to a target length: minus the relative distance, 0 at the target."""

    Params = LengthParams

    def score_text(self, prompt: str, answer: str, params: LengthParams) -> float:
        distance = abs(measure(answer, params.unit) - params.target)
        return -float(distance / params.target)


def measure(text: str, unit: str) -> int:
    """Return the length of a text in "words" (separated by space), "characters", or "sentences" (runs of . ! or ?)."""
    if unit == "words":
        return len(text.split())
    if unit == "characters":
        return len(text)
    return len(re.findall(r"[^.!?\s][^.!?]*[.!?]+", text))


class RegexParams(Params):
    pattern: str = Field(default=r"""[.!?]["')\]]*\s*$""", min_length=1, max_length=4096)
    mode: Literal["search", "fullmatch", "absent"] = Field(
        default="search", description="'absent' turns it round: 1 if the pattern is nowhere in the answer."
    )
    ignore_case: bool = False


class Regex(TextReward[RegexParams]):
    """1 if the answer matches a regular expression, else 0 (by default: it ends as a sentence does)."""

    Params = RegexParams

    def check(self, params: RegexParams, services: Services) -> None:
        try:
            regex.compile(params.pattern)
        except regex.error as error:
            raise ValueError(f"'pattern' is not a regular expression: {error}") from error

    def score_text(self, prompt: str, answer: str, params: RegexParams) -> float:
        flags = regex.IGNORECASE if params.ignore_case else 0
        matched = _matches(params.pattern, answer, flags, full=params.mode == "fullmatch")
        return float(matched != (params.mode == "absent"))


def _matches(pattern: str, text: str, flags: int = 0, *, full: bool = False) -> bool:
    """Return True if the pattern matches. Raises ValueError when it takes too long."""
    compiled = regex.compile(pattern, flags)
    find = compiled.fullmatch if full else compiled.search
    try:  # concurrent: without the interpreter's lock, so that a slow pattern holds up nobody
        return find(text, timeout=PATTERN_TIMEOUT_S, concurrent=True) is not None
    except TimeoutError:
        raise ValueError(f"the pattern takes more than {PATTERN_TIMEOUT_S} s on one answer") from None


class JsonSchemaParams(Params):
    schema_: dict[str, Any] = Field(
        default={}, alias="schema", description="JSON Schema (2020-12); empty: any JSON will do."
    )


class JsonSchema(TextReward[JsonSchemaParams]):
    """1 if the answer is JSON that satisfies a schema, 0.5 if it is other JSON, 0 if it is not JSON."""

    Params = JsonSchemaParams

    def check(self, params: JsonSchemaParams, services: Services) -> None:
        try:
            Draft202012Validator.check_schema(params.schema_)
        except SchemaError as error:
            raise ValueError(f"'schema' is not a JSON schema: {error.message}") from error

    def score_text(self, prompt: str, answer: str, params: JsonSchemaParams) -> float:
        try:
            value = parse_json(answer)
        except JsonFault:
            return 0.0
        # An empty registry: a schema's $ref must never make the server fetch a URL.
        validator = SafeValidator(params.schema_, registry=Registry())
        try:
            return 1.0 if validator.is_valid(value) else 0.5
        except Unresolvable as error:
            raise ValueError(f"the schema refers to something outside itself: {error}") from error


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _matches(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        for pattern, subschema in patterns.items():
            for key, value in instance.items():
                if _matches(pattern, key):
                    yield from validator.descend(value, subschema, path=key, schema_path=pattern)


SafeValidator: Any = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, {"pattern": _pattern, "patternProperties": _pattern_properties}
)
