"""The rule rewards, and that hostile patterns and schemas hurt nobody."""

import asyncio
from typing import Any

import pytest

from guiderail.guides import Message
from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.reward import Reward
from guiderail.guides.core.types import Answer, ScoreGroup, TokenPrompt
from guiderail.server.rewards.rules import JsonSchema, Keywords, Length, Regex, content_words
from guiderail.server.rewards.verdicts import probability_of_first

SERVICES: Any = Services(engine=None, renderer=None)  # type: ignore[arg-type]


async def scores(reward: Reward, answers: list[str], prompt: str = "", **params: Any) -> tuple[float, ...]:
    """The values of answers, as a request for scores has them."""
    parsed = reward.Params.model_validate(params)
    reward.check(parsed, SERVICES)
    await reward.vet(parsed)
    question = (Message("user", prompt),)
    (result,) = await reward.score([ScoreGroup(question, TokenPrompt(()), tuple(map(Answer, answers)), parsed)])
    return result.values


async def score(reward: Reward, answer: str, prompt: str = "", **params: Any) -> float:
    (value,) = await scores(reward, [answer], prompt, **params)
    return value


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
async def test_keywords(answer: str, params: dict[str, Any], value: float) -> None:
    assert await score(Keywords(), answer, **params) == value


async def test_keywords_default_to_the_questions_content_words() -> None:
    question = "What is the capital of France, and which river flows there?"
    assert content_words(question) == ["capital", "france", "river", "flows"]
    assert await score(Keywords(), "Paris is the capital of France.", question) == 0.5
    assert await score(Keywords(), "anything", "Why?") == 0.0


async def test_length_is_zero_at_the_target_and_falls_off() -> None:
    assert await score(Length(), "one two three", target=3) == 0.0
    assert await score(Length(), "one two three", target=2) == -0.5
    assert await score(Length(), "abcd", target=2, unit="characters") == -1.0
    assert await score(Length(), "A b. C d! E?", target=3, unit="sentences") == 0.0
    assert await score(Length(), "...? A b.. C d!? ! no end", target=2, unit="sentences") == 0.0


async def test_sentences_are_counted_in_one_pass() -> None:
    """A search for each sentence's end from each of its characters took an hour for such an answer."""
    assert await score(Length(), "a" * 2_000_000, target=1, unit="sentences") == -1.0


async def test_regex() -> None:
    assert await score(Regex(), "Yes.") == 1.0
    assert await score(Regex(), 'He said "yes."\n') == 1.0
    assert await score(Regex(), "and then") == 0.0
    assert await score(Regex(), "abc", pattern="b") == 1.0
    assert await score(Regex(), "abc", pattern="b", mode="fullmatch") == 0.0
    assert await score(Regex(), "abc", pattern="B", mode="absent") == 1.0
    assert await score(Regex(), "abc", pattern="B", mode="absent", ignore_case=True) == 0.0
    assert await score(Regex(), "an \ud83d", pattern="an .$") == 1.0


async def test_json_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert await scores(JsonSchema(), ['{"a": 1}', '{"a": "x"}', "no"], schema=schema) == (1.0, 0.5, 0.0)
    assert await score(JsonSchema(), "7") == 1.0


async def test_many_answers_keep_their_order() -> None:
    answers = [str(i) if i % 3 else "no" for i in range(300)] + ["1" * 200_000, "no"]
    assert await scores(JsonSchema(), answers) == tuple(float(answer != "no") for answer in answers)


@pytest.mark.parametrize("answer", ["NaN", "[Infinity]", '{"a": -Infinity}', "nope", "", "[" * 100_000, "'1'"])
async def test_what_is_no_json_is_worth_nothing(answer: str) -> None:
    assert await score(JsonSchema(), answer) == 0.0


@pytest.mark.parametrize(
    ("answer", "schema", "value"),
    [
        ("1e400", {"multipleOf": 0.1}, 1.0),
        ("1e308", {"multipleOf": 0.1}, 1.0),
        ("0.3", {"multipleOf": 0.1}, 1.0),
        ("0.35", {"multipleOf": 0.1}, 0.5),
        ("1e-400", {"multipleOf": 0.1}, 0.5),
        ("1e99999999999999999999", {"multipleOf": 7}, 0.5),
        ("1e-99999999999999999999", {"multipleOf": 7}, 0.5),
        ("0e5", {"multipleOf": 7}, 1.0),
        ("9" * 5000, {"multipleOf": 9}, 1.0),
        ("9" * 5000, {"type": "integer", "minimum": 1e300}, 1.0),
        ("1" + "0" * 400, {"multipleOf": 0.5}, 1.0),
        ("1e400", {"type": "integer"}, 1.0),
        ("1.0", {"type": "integer"}, 1.0),
        ("1.5", {"type": "integer"}, 0.5),
        ("true", {"type": "integer"}, 0.5),
        ("1e400", {"maximum": 1e308}, 0.5),
        ("0.1", {"enum": [0.1]}, 1.0),
        ("0.10", {"const": 0.1}, 1.0),
        ("[1, 1.0]", {"uniqueItems": True}, 0.5),
        ("[" * 500 + "]" * 500, {}, 1.0),
    ],
)
async def test_numbers_and_nesting_have_no_end(answer: str, schema: Any, value: float) -> None:
    assert await score(JsonSchema(), answer, schema=schema) == value


TREE = {
    "type": "object",
    "properties": {"children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["children"],
}
LIST = {
    "$ref": "#/$defs/list",
    "$defs": {"list": {"type": ["object", "null"], "properties": {"next": {"$ref": "#/$defs/list"}}}},
}
NAMED = {"$ref": "#tree", "$defs": {"t": {"$anchor": "tree", "type": "array", "items": {"$dynamicRef": "#tree"}}}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (TREE, '{"children": [{"children": []}]}', '{"children": [{"kids": []}]}'),
        (LIST, '{"next": {"next": null}}', '{"next": {"next": 1}}'),
        (NAMED, "[[[]]]", "[[1]]"),
        (
            {"$id": "https://example.org/a", "items": {"$ref": "b"}, "$defs": {"b": {"$id": "b", "const": 1}}},
            "[1]",
            "[2]",
        ),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, '{"minLength": 2}', '{"minLength": -2}'),
        ({"properties": {"$ref": {"const": 1}}}, '{"$ref": 1}', '{"$ref": 2}'),
    ],
)
async def test_schemas_may_refer_to_themselves(schema: Any, good: str, bad: str) -> None:
    assert await scores(JsonSchema(), [good, bad], schema=schema) == (1.0, 0.5)


def doubling(steps: int, keyword: str = "allOf") -> dict[str, Any]:
    """A small schema in which one value is looked at 2^steps times."""
    twice = [{keyword: [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(steps)]
    return {"$ref": "#/$defs/0", "$defs": {str(i): each for i, each in enumerate([*twice, {"type": "object"}])}}


def chain(steps: int) -> dict[str, Any]:
    """Schemas that refer to each other in a line."""
    return {
        "$ref": "#/$defs/0",
        "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(steps)} | {str(steps): {}},
    }


def nested(depth: int, keyword: str = "items") -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {keyword: [schema] if keyword == "allOf" else schema}
    return schema


HOSTILE: dict[str, tuple[Reward, dict[str, Any], str]] = {
    "no regex": (Regex(), {"pattern": "("}, "'pattern' is not a regular expression"),
    "a count": (Regex(), {"pattern": "a{1500000}"}, "'pattern' is over 20000 characters long with its repeats"),
    "a range": (Regex(), {"pattern": "(ab){2,99999999999999999999}"}, "over 20000 characters long"),
    "groups": (Regex(), {"pattern": "(" * 1000 + ")" * 1000}, "more than 50 groups"),
    "counts of counts": (Regex(), {"pattern": "(((a{9999}){9999}){9999}){9999}b"}, "'pattern' is over 20000"),
    "a name twice": (Regex(), {"pattern": "(?P<a>.)" * 2 + "(?P=b)"}, "not a regular expression"),
    "length": (Regex(), {"pattern": "a" * 5000}, "4096 characters"),
    "no schema": (JsonSchema(), {"schema": {"type": "banana"}}, "'schema' is not a JSON schema"),
    "itself": (JsonSchema(), {"schema": {"$ref": "#"}}, "refers to itself without an end"),
    "in a circle": (JsonSchema(), {"schema": {"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"not": {"$ref": "#"}}}}}, "without an end"),
    "a circle by names": (JsonSchema(), {"schema": {"$anchor": "a", "allOf": [{"$dynamicRef": "#a"}]}}, "without an end"),
    "doubling": (JsonSchema(), {"schema": doubling(38)}, "stand for over 10000 schemas"),
    "a URL": (JsonSchema(), {"schema": {"$ref": "http://127.0.0.1:9/schema.json"}}, "refers to 'http.*nothing is looked up"),
    "a file": (JsonSchema(), {"schema": {"items": {"$ref": "file:///etc/passwd"}}}, "refers to 'file"),
    "nowhere": (JsonSchema(), {"schema": {"items": {"$ref": "#/$defs/none"}}}, "refers to '#/"),
    "depth": (JsonSchema(), {"schema": nested(200)}, "nests more than 64"),
    "properties": (JsonSchema(), {"schema": {"properties": {f"p{i}": {} for i in range(100_000)}}}, "more than 10000 values"),
    "an enum": (JsonSchema(), {"schema": {"enum": list(range(12_000))}}, "more than 10000 values"),
    "names": (JsonSchema(), {"schema": {"required": ["x" * 100_000, "y" * 100_001]}}, "more than 200000 characters"),
    "patterns": (JsonSchema(), {"schema": {"allOf": [{"pattern": "a"}] * 101}}, "more than 100 patterns"),
    "a bad pattern": (JsonSchema(), {"schema": {"pattern": "("}}, "'\\(' for a pattern"),
    "a pattern's count": (JsonSchema(), {"schema": {"patternProperties": {"a{1500000}": {}}}}, "1500000}', which is over 20000"),
    "an empty word": (Keywords(), {"words": [" "]}, "empty words"),
    "long words": (Keywords(), {"words": ["x" * 20_000]}, "16384 are allowed"),
    "a target": (Length(), {"target": 0}, "greater than or equal to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_a_client_may_not_ask_for_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the schema made the server open a URL")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    reward, params, message = HOSTILE[name]
    with pytest.raises((ValueError, RequestError), match=message):
        await score(reward, "aaaa", **params)


SLOW: dict[str, tuple[Reward, dict[str, Any], str]] = {
    "alternatives": (Regex(), {"pattern": "(a|aa)+$"}, "a" * 60 + "b"),
    "repeats of repeats": (Regex(), {"pattern": "(?:a|b|ab)*$"}, "ab" * 60 + "c"),
    "in a schema": (JsonSchema(), {"schema": {"pattern": "(a|aa)+$"}}, f'"{"a" * 60}b"'),
    "of names": (JsonSchema(), {"schema": {"patternProperties": {"(a|aa)+$": {}}}}, f'{{"{"a" * 60}b": 1}}'),
    "names left over": (JsonSchema(), {"schema": {"patternProperties": {"(a|aa)+$": {}}, "additionalProperties": False}}, f'{{"{"a" * 60}b": 1}}'),
    "doubling by level": (JsonSchema(), {"schema": {"allOf": [{"items": {"$ref": "#"}}, {"items": {"$ref": "#"}}]}}, "[" * 60 + "]" * 60),
    "pairs": (JsonSchema(), {"schema": {"uniqueItems": True}}, str([{"a": i} for i in range(20_000)]).replace("'", '"')),
    "words": (Keywords(), {"words": ["a a " * 2000 + "b"]}, "a " * 500_000),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
async def test_what_takes_for_ever_on_an_answer_is_ended_and_the_event_loop_goes_on(name: str) -> None:
    reward, params, answer = SLOW[name]
    refused = asyncio.create_task(score(reward, answer, **params))
    beats = 0
    while not refused.done():
        await asyncio.sleep(0.01)
        beats += 1
    with pytest.raises(RequestError, match=r"what it is given takes more than 1 s of processor time"):
        await refused
    assert beats > 20  # the second of processor time passed elsewhere
    assert await score(reward, '"."') is not None, "the next one is served"


def test_probability_of_first() -> None:
    assert probability_of_first(-1.0, -1.0) == 0.5
    assert probability_of_first(-2.0, -1.0) == pytest.approx(1 / (1 + 2.718281828))
    assert probability_of_first(-1e9, -1.0) == pytest.approx(0.0)
    assert probability_of_first(-1.0, -1e9) == 1.0
