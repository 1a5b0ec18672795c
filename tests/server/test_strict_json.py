"""JSON of others: what is no JSON, and what is but hurts further on, is refused with the path of the fault."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guiderail.server.strict_json import MAX_DEPTH, JsonFault, printable, read_body

DEEP = MAX_DEPTH + 1
BODIES: list[tuple[bytes, str, str]] = [
    (b"", "not valid JSON", ""),
    (b"{", "not valid JSON", ""),
    (b"{'a': 1}", "not valid JSON", ""),
    (b'{"a": 01}', "not valid JSON", ""),
    (b'{"a": 1} {}', "not valid JSON", ""),
    (b'{"a": "\n"}', "not valid JSON", ""),
    (b'{"a": "\xff"}', "not UTF-8 at byte 7", ""),
    (b'{"a": "\xed\xa0\xbd"}', "not UTF-8 at byte 7", ""),  # a surrogate's own bytes
    ('{"a": 1}'.encode("utf-16"), "not UTF-8 at byte 0", ""),
    (b'{"a": NaN}', "not a finite number", "a"),
    (b'{"a": {"b": [1, -Infinity]}}', "not a finite number", "a.b[1]"),
    (b'{"a": 1e999}', "beyond a float", "a"),
    (b'{"a": [{"weight": 1%s}]}' % (b"0" * 400), "beyond a float", "a[0].weight"),
    (b'{"a": {"seed": -1%s}}' % (b"0" * 5000), "beyond a float", "a.seed"),  # more digits than int() takes
    (b'{"model": "\\ud83d"}', r"half of a surrogate pair, \ud83d", "model"),
    (b'{"a": ["x", "\\ude00\\ud83d"]}', r"half of a surrogate pair, \ude00", "a[1]"),
    (b'{"a": {"\\ud83d": 1}}', "has a name with half of a surrogate pair", "a"),
    (b'{"a": 1, "a": 2}', "gives a name twice", ""),
    (b'{"a": [{"b": 1, "\\u0062": 1}]}', "gives a name twice", "a[0]"),
    (b'{"user": %s%s}' % (b"[" * 20000, b"]" * 20000), "nests deeper", ""),
    (b'{"user": %s%s}' % (b"[" * DEEP, b"]" * DEEP), "nests deeper", "user[0][0][0][0][0]"),
    (b'{"a":' * 20000 + b"1" + b"}" * 20000, "nests deeper", ""),
]


@pytest.mark.parametrize(("body", "message", "path"), BODIES)
def test_a_body_is_refused_by_the_path_of_its_fault(body: bytes, message: str, path: str) -> None:
    with pytest.raises(JsonFault) as fault:
        read_body(body)
    assert message in str(fault.value)
    assert fault.value.path == path


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"\xef\xbb\xbf{}", {}),  # a byte order mark, as editors and PowerShell write it
        (b'"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        ('["\N{GRINNING FACE}é"]'.encode(), ["\N{GRINNING FACE}é"]),
        (b"[18446744073709551615, -9223372036854775808]", [2**64 - 1, -(2**63)]),
        (b"[100000000000000000000]", [1e20]),  # JavaScript's 1e20
        (b"[1e308, 5e-324, 1e-999]", [1e308, 5e-324, 0.0]),
        (b'{"a": {"a": {"b": null}}, "b": [true, []]}', {"a": {"a": {"b": None}}, "b": [True, []]}),
        (b"%s%s" % (b"[" * MAX_DEPTH, b"]" * MAX_DEPTH), json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)),
    ],
)
def test_a_body_that_is_fine_is_read(body: bytes, value: object) -> None:
    assert read_body(body) == value


def test_how_deep_the_caller_stands_makes_no_difference() -> None:
    def deeper(levels: int) -> object:
        return deeper(levels - 1) if levels else read_body(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)

    assert deeper(500) == read_body(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
JSONS = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=20,
)


@given(value=JSONS, escaped=st.booleans())
def test_what_is_harmless_comes_back(value: object, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    assert read_body(text.encode()) == value


@given(data=st.binary(max_size=40) | st.text('[]{}",:\\ud8013eENI-. ', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_are_a_fault(data: bytes) -> None:
    with suppress(JsonFault):
        json.dumps(read_body(data), allow_nan=False, ensure_ascii=False).encode()


def test_a_clients_text_can_be_shown() -> None:
    assert printable("é\ud83d") == "é\\ud83d"
    assert printable("x" * 10**6, 5) == "xxxxx..."
