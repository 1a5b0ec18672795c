"""The rule rewards, and that hostile patterns and schemas hurt nobody."""

from typing import Any

import pytest

from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.reward import TextReward
from guiderail.server.rewards.rules import JsonSchema, Keywords, Length, Regex, content_words
from guiderail.server.rewards.verdicts import probability_of_first

SERVICES: Any = Services(engine=None, renderer=None)  # type: ignore[arg-type]


def score(reward: TextReward, answer: str, prompt: str = "", **params: Any) -> float:
    parsed = reward.Params.model_validate(params)
    reward.check(parsed, SERVICES)
    return reward.score_text(prompt, answer, parsed)


@pytest.mark.parametrize(
    ("answer", "params", "value"),
    [
        ("The dog ran.", {"words": ["dog", "cat"]}, 0.5),
        ("dogs", {"words": ["dog"]}, 0.0),
        ("dogs", {"words": ["dog"], "match": "prefix"}, 1.0),
        ("hotdog", {"words": ["dog"], "match": "prefix"}, 0.0),
        ("DOG", {"words": ["dog"]}, 1.0),
        ("DOG", {"words": ["dog"], "case_sensitive": True}, 0.0),
        ("C++ (well)", {"words": ["c++", "(well)"]}, 1.0),
        ("", {"words": ["a"]}, 0.0),
    ],
)
def test_keywords(answer: str, params: dict[str, Any], value: float) -> None:
    assert score(Keywords(), answer, **params) == value


def test_keywords_default_to_the_questions_content_words() -> None:
    question = "What is the capital of France, and which river flows there?"
    assert content_words(question) == ["capital", "france", "river", "flows"]
    assert score(Keywords(), "Paris is the capital of France.", question) == 0.5
    assert score(Keywords(), "anything", "Why?") == 0.0


def test_length_is_zero_at_the_target_and_falls_off() -> None:
    assert score(Length(), "one two three", target=3) == 0.0
    assert score(Length(), "one two three", target=2) == -0.5
    assert score(Length(), "abcd", target=2, unit="characters") == -1.0
    assert score(Length(), "A b. C d! E?", target=3, unit="sentences") == 0.0


def test_regex() -> None:
    assert score(Regex(), "Yes.") == 1.0
    assert score(Regex(), 'He said "yes."\n') == 1.0
    assert score(Regex(), "and then") == 0.0
    assert score(Regex(), "abc", pattern="b") == 1.0
    assert score(Regex(), "abc", pattern="b", mode="fullmatch") == 0.0
    assert score(Regex(), "abc", pattern="B", mode="absent") == 1.0
    assert score(Regex(), "abc", pattern="B", mode="absent", ignore_case=True) == 0.0


def test_a_pattern_of_exponential_time_is_stopped() -> None:
    """It would take hours. The limit is told, and short: the event loop's other requests wait for it."""
    with pytest.raises(ValueError, match=r"takes more than 0\.1 s"):
        score(Regex(), "a" * 60 + "b", pattern="(a|aa)+$")


def test_json_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert score(JsonSchema(), '{"a": 1}', schema=schema) == 1.0
    assert score(JsonSchema(), '{"a": "x"}', schema=schema) == 0.5
    assert score(JsonSchema(), "no", schema=schema) == 0.0
    assert score(JsonSchema(), "[" * 100_000, schema=schema) == 0.0
    assert score(JsonSchema(), "7") == 1.0


def test_json_schema_patterns_work_and_are_bounded() -> None:
    assert score(JsonSchema(), '"abc"', schema={"pattern": "^a"}) == 1.0
    assert score(JsonSchema(), '"xbc"', schema={"pattern": "^a"}) == 0.5
    properties = {"patternProperties": {"^n": {"type": "integer"}}}
    assert score(JsonSchema(), '{"n1": 2, "m": "x"}', schema=properties) == 1.0
    assert score(JsonSchema(), '{"n1": "x"}', schema=properties) == 0.5
    with pytest.raises(ValueError, match="takes more than"):
        score(JsonSchema(), f'"{"a" * 40}b"', schema={"pattern": "(a|aa)+$"})


def test_json_schema_never_fetches_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the schema made the server open a URL")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ValueError, match="outside itself"):
        score(JsonSchema(), "{}", schema={"$ref": "http://127.0.0.1:9/schema.json"})


@pytest.mark.parametrize(
    ("reward", "params", "message"),
    [
        (Regex(), {"pattern": "("}, "not a regular expression"),
        (JsonSchema(), {"schema": {"type": "banana"}}, "not a JSON schema"),
        (Keywords(), {"words": [" "]}, "empty words"),
        (Length(), {"target": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_parameters_are_refused(reward: TextReward, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(reward, "", **params)


def test_probability_of_first() -> None:
    assert probability_of_first(-1.0, -1.0) == 0.5
    assert probability_of_first(-2.0, -1.0) == pytest.approx(1 / (1 + 2.718281828))
    assert probability_of_first(-1e9, -1.0) == pytest.approx(0.0)
    assert probability_of_first(-1.0, -1e9) == 1.0
