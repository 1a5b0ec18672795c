"""The jobs of the process with limits: what is done with clients' patterns and schemas. Only it and tests call these.

Each returns JSON, or raises ValueError with what is wrong with the pattern, the schema or what it does to an answer.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module

import regex

from guiderail.server.bounded import schema_validation
from guiderail.server.bounded.grammar import try_grammar

KEPT = 256  # compiled patterns and schemas


def check_pattern(pattern: str) -> None:
    """Compile a pattern."""
    _compiled(pattern, False)


def match_pattern(pattern: str, mode: str, ignore_case: bool, answers: Sequence[str]) -> list[float]:
    """Values of the reward `regex`."""
    compiled = _compiled(pattern, ignore_case)
    find = compiled.fullmatch if mode == "fullmatch" else compiled.search
    return [float((find(answer) is not None) != (mode == "absent")) for answer in answers]


@lru_cache(KEPT)
def _compiled(pattern: str, ignore_case: bool) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    except (regex.error, OverflowError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as error:
        # The latter come of odd patterns that its parser does not foresee.
        raise ValueError(f"is not a regular expression: {error}") from error


def find_words(words: Sequence[str], prefix: bool, case_sensitive: bool, answers: Sequence[str]) -> list[float]:
    """Values of the reward `keywords`: the fraction of the words that each answer contains; 0 of none."""
    end = "" if prefix else r"(?!\w)"
    flags = 0 if case_sensitive else re.IGNORECASE
    patterns = [re.compile(rf"(?<!\w){re.escape(word.strip())}{end}", flags) for word in words]
    most = len(patterns) or 1
    return [sum(each.search(answer) is not None for each in patterns) / most for answer in answers]


def check_schema(schema: str) -> None:
    """Check a schema (JSON) against the metaschema, its references, and its patterns."""
    schema_validation.validator(schema)


def validate(schema: str, answers: Sequence[str]) -> list[float]:
    """Values of the reward `json_schema`: 1 for JSON that satisfies the schema, 0.5 for other JSON, 0 for none."""
    validator = schema_validation.validator(schema)
    return [schema_validation.value(validator, answer) for answer in answers]


def check_grammar(schema: str) -> None:
    """Make a schema (JSON) a grammar, as the engine does."""
    try_grammar(schema)


def preload() -> None:
    """Import what the jobs import on their way."""
    import_module("llguidance")


JOBS: Mapping[str, Callable[..., object]] = {
    each.__name__: each for each in (check_pattern, match_pattern, find_words, check_schema, validate, check_grammar)
}
