"""Limits on the size of patterns and schemas, without compiling either."""

from typing import Any

import pytest

from guiderail.server.bounded.sizes import MAX_PATTERN_SIZE, MAX_SCHEMA_DEPTH, check_pattern_size, check_schema_size


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [
        (r"^[\s\S]{0,2000}$", ""),
        (r"(?:\d{4}-\d\d){1,100}", ""),
        (f"a{{{MAX_PATTERN_SIZE}}}", ""),
        (f"a{{{MAX_PATTERN_SIZE + 1}}}", "written out"),
        (f"a{{2,{MAX_PATTERN_SIZE + 1}}}", "written out"),
        (f"a{{,{MAX_PATTERN_SIZE + 1}}}", "written out"),
        (f"a{{{'9' * 4000}}}", "written out"),
        ("(a{150}){150}", "written out"),
        ("((a{30}){30}){30}", "written out"),
        ("(a{30}b{30}){300}", ""),
        ("(a{30}b{30}){400}", "written out"),
        ("(a{1500000}){0}", "written out"),
        (r"[{1500000}]", ""),
        (r"[]{1500000}]", ""),
        (r"\{1500000}", ""),
        (r"\({20}" * 60, ""),
        ("[(]" * 200, ""),
        ("(" * 50 + ")" * 50, ""),
        ("(" * 51 + ")" * 51, "groups in each other"),
        ("()" * 2000, ""),
        (")" * 100 + "{9}", ""),
        ("{9}", ""),
        ("[" * 4000, ""),
        ("\\", ""),
        ("a" * 4097, "4096 are allowed"),
    ],
)
def test_patterns(pattern: str, refused: str) -> None:
    if not refused:
        check_pattern_size(pattern)
        return
    with pytest.raises(ValueError, match=refused):
        check_pattern_size(pattern)


def lists(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize(
    ("schema", "refused"),
    [
        ({}, ""),
        ({"const": lists(MAX_SCHEMA_DEPTH - 1)}, ""),
        ({"const": lists(MAX_SCHEMA_DEPTH)}, "more than 64 objects and lists"),
        ({"const": lists(100_000)}, "more than 64 objects and lists"),
        ({"enum": list(range(9_000))}, ""),
        ({"enum": [list(range(90))] * 90}, ""),
        ({"enum": [list(range(90))] * 120}, "more than 10000 values"),
        ({"properties": {"pattern": {"const": 1}, "patternProperties": {"("}}}, ""),
        ({"pattern": 1, "patternProperties": 2}, ""),
        ({"x" * 200_001: 1}, "200000 characters"),
        ({"description": "x" * 200_001}, "200000 characters"),
        ({"pattern": "x" * 5000}, "'xxx.*', which has 5000 characters"),
        ({"patternProperties": {"x" * 5000: {}}}, "which has 5000 characters"),
    ],
)
def test_schemas(schema: Any, refused: str) -> None:
    if not refused:
        check_schema_size(schema)
        return
    with pytest.raises(ValueError, match=refused):
        check_schema_size(schema)
