"""JSON schemas (2020-12) on answers, with exact numbers: jsonschema's keywords, but for those that overflow."""

import json
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, SchemaError
from jsonschema.exceptions import UnknownType, ValidationError
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable

from guiderail.server.bounded.references import References
from guiderail.server.bounded.sizes import patterns_of

LONGEST_INTEGER = 4000  # digits that Python makes an int of; longer ones are Decimals
LARGEST_EXPONENT = 10**17


class NotJson(ValueError):
    """A text is no JSON, or nests more deeply than is read."""


@lru_cache(256)
def validator(schema: str) -> Any:
    """Return the validator of a schema (JSON). Raises ValueError for what is no schema, or refers out of itself."""
    content = json.loads(schema, parse_float=_number, parse_int=_integer)
    try:
        Draft202012Validator.check_schema(content, format_checker=FormatChecker(()))
    except SchemaError as error:
        raise ValueError(f"is not a JSON schema: {error.message}") from error
    references = References(content)
    references.check()
    for each in references.reached():
        for pattern in patterns_of(each):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"has {pattern!r} for a pattern: {error}") from error
    # An empty registry: a schema's $ref must never make the server fetch a URL.
    return _Validator(content, registry=Registry())


def value(validator: Any, answer: str) -> float:
    """1 for JSON that the schema allows, 0.5 for other JSON, 0 for none. Raises ValueError if it cannot be told."""
    try:
        instance = read(answer)
    except NotJson:
        return 0.0
    try:
        return 1.0 if validator.is_valid(instance) else 0.5
    except Unresolvable as error:
        raise ValueError(f"refers to something outside itself: {error}") from error
    except RecursionError:
        raise ValueError("goes on for ever on an answer, or nests too deeply") from None
    except (re.error, UnknownType, ArithmeticError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"cannot be applied to an answer: {error!r}") from error


def read(text: str) -> Any:
    """Return what JSON stands for, numbers exactly. Raises NotJson."""
    try:
        return json.loads(text, parse_float=_number, parse_int=_integer, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from error


def _number(text: str) -> int | Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation:  # an exponent that no Decimal has
        mantissa, _, exponent = text.lower().partition("e")
        number = Decimal(f"{mantissa}e{exponent[0] if exponent.startswith('-') else ''}{LARGEST_EXPONENT}")
    small = abs(number.adjusted()) < LONGEST_INTEGER
    return int(number) if small and number == number.to_integral_value() else number


def _integer(text: str) -> int | Decimal:
    return int(text) if len(text) <= LONGEST_INTEGER else Decimal(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _is_integer(checker: Any, instance: Any) -> bool:
    if isinstance(instance, Decimal):
        return instance == instance.to_integral_value()
    return isinstance(instance, int) and not isinstance(instance, bool)


def _multiple_of(validator: Any, divisor: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "number") and not is_multiple(instance, divisor):
        yield ValidationError(f"{instance!r} is not a multiple of {divisor}")


def is_multiple(number: int | Decimal, divisor: int | Decimal) -> bool:
    """Return True if number / divisor is an integer, exactly, whatever their exponents. divisor: above 0."""
    (n, e), (d, f) = _parts(number), _parts(divisor)  # n 10^e / (d 10^f)
    if e >= f or not n:
        return n * pow(10, max(0, e - f), d) % d == 0
    digits = f - e
    return digits < n.bit_length() and n % (d * 10**digits) == 0  # else |n| < 10^digits


def _parts(number: int | Decimal) -> tuple[int, int]:
    """Return integers of which number is the first times ten to the second."""
    if not isinstance(number, Decimal):
        return number, 0
    sign, digits, exponent = number.as_tuple()
    assert isinstance(exponent, int)
    return int(Decimal((sign, digits, 0))), exponent


_Validator: Any = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    {"multipleOf": _multiple_of},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)
