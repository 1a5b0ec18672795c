"""Whatever a client writes as a pattern or schema: values or a refusal, from a process that goes on."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guiderail.server.bounded.bounded import Bounded, Refused
from guiderail.server.bounded.grammar import grammar_schema
from guiderail.server.bounded.sizes import check_pattern_size, check_schema_size


@pytest.fixture(scope="module")
def processes() -> Iterator[Bounded]:
    made = Bounded()
    yield made
    made.stop()


PIECES = st.sampled_from(
    r"""a b ab . \w \s \d \b ^ $ | ( ) (?: (?= (?! (?<= (?<! (?P<n> (?P=n) (?> (?i) (?e) (?|{e<=2} [ ] [^ - \1 \2 * + ? *+ *?
    {2} {2,} {,3} {2,5} {100} {9999} {e} {i<=1,d<=2} \p{L} \X \R \G \K (?1) (?R) (?&n) (?(1) \N{DOG} \x41 \u0041 \L<w> [a-z&&[^b]]
    [[:alpha:]] (?# ) \ é \Z""".split()  # noqa: SIM905
)
PATTERNS = st.lists(PIECES, min_size=1, max_size=14).map("".join) | st.text(max_size=30)
TEXTS = st.text("ab \n.é1", max_size=60) | st.sampled_from(["a" * 200 + "b", "ab" * 200, "", "\ud83d"])


def allowed(check: Any, value: Any) -> bool:
    try:
        check(value)
    except ValueError:
        return False
    return True


@settings(max_examples=60)
@given(pattern=PATTERNS, answers=st.lists(TEXTS, max_size=3), mode=st.sampled_from(["search", "fullmatch", "absent"]))
def test_patterns(processes: Bounded, pattern: str, answers: list[str], mode: str) -> None:
    if allowed(check_pattern_size, pattern):
        try:
            processes.submit("check_pattern", pattern).result()
            values = processes.submit("match_pattern", pattern, mode, True, answers).result()
        except Refused:
            return
        assert isinstance(values, list)
        assert len(values) == len(answers)


NUMBERS = st.integers(-3, 300) | st.sampled_from([0.1, -1e308, 1e-300, 10**30, 5e-324])
REFERENCES = st.sampled_from(
    ["#", "#/$defs/a", "#/$defs/b", "#a", "#/properties/x", "#/%24defs/a", "b.json", "http://h/x", "#//", "", "a#a"]
)
SCHEMAS = st.recursive(
    st.booleans() | st.builds(lambda r: {"$ref": r}, REFERENCES) | st.just({}),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "array", "string", "integer", "number", "null", "banana", ["array", "null"]]),
            **dict.fromkeys(("not", "if", "then", "else", "items", "contains", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties"), inner),
            **{key: st.lists(inner, max_size=3) for key in ("allOf", "anyOf", "oneOf", "prefixItems")},
            **{key: st.dictionaries(st.sampled_from(["a", "b", "x", "^a", "(a+)+$", "("]), inner, max_size=3) for key in ("properties", "patternProperties", "$defs", "dependentSchemas")},
            **dict.fromkeys(("multipleOf", "minimum", "maximum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "minContains", "maxContains", "minProperties", "maxProperties"), NUMBERS),
            "pattern": st.sampled_from(["a", "(a|aa)+$", "a{9999}", "(", r"\p{L}", "^(a|b)*a(a|b){20}$"]),
            "format": st.sampled_from(["date", "regex", "x", "email"]),
            "uniqueItems": st.booleans(),
            "enum": st.lists(st.none() | NUMBERS | st.text(max_size=3), max_size=4),
            "const": st.none() | NUMBERS,
            "required": st.lists(st.sampled_from(["a", "b", "x"]), max_size=2),
            "$ref": REFERENCES,
            "$dynamicRef": REFERENCES,
            "$anchor": st.sampled_from(["a", "b"]),
            "$dynamicAnchor": st.just("a"),
            "$id": st.sampled_from(["a", "b.json", "http://h/x", "#"]),
            "$schema": st.sampled_from(["https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema#", "x"]),
        },
    ),
    max_leaves=12,
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "x", "aaab"]), inner, max_size=3)
    ),
    max_leaves=10,
)
ANSWERS = VALUES.map(json.dumps) | st.sampled_from(
    ["[" * 60 + "]" * 60, "1e9999999999999999999", "-0", "9" * 5000, '{"a": 1e-999}', "NaN"]
)


@settings(max_examples=60)
@given(schema=SCHEMAS, answers=st.lists(ANSWERS, min_size=1, max_size=3))
@example({"$id": "#"}, ["1"])
@example({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#"}, "allOf": [{"$anchor": "a"}]}}}, ["[[[]]]"])
def test_schemas(processes: Bounded, schema: Any, answers: list[str]) -> None:
    if isinstance(schema, dict) and allowed(check_schema_size, schema):
        text = json.dumps(schema)
        try:
            processes.submit("check_schema", text).result()
            values = processes.submit("validate", text, answers).result()
        except Refused:
            return
        assert isinstance(values, list)
        assert set(values) <= {0.0, 0.5, 1.0}


@settings(max_examples=60)
@given(schema=SCHEMAS)
def test_grammars(processes: Bounded, schema: Any) -> None:
    if isinstance(schema, dict) and allowed(check_schema_size, schema):
        try:
            given = grammar_schema(schema)
        except ValueError:
            return
        try:
            processes.submit("check_grammar", json.dumps(given)).result()
        except Refused:
            return
