"""JSON schemas as the engine's grammars: what it is given, and whether its library (llguidance) takes it quickly."""

import json
import random
import time
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from guiderail.server.bounded.references import References, check_references

MAX_CPU_S = 0.1  # to make the grammar, and each mask over the tokens: the engine has to, for every sequence
STEPS = 100  # of an answer that is tried


def grammar_schema(schema: Mapping[str, object]) -> dict[str, object]:
    """Return a schema as the engine is given it. Raises ValueError for references that lead out of it or never end.

    `oneOf` is read as `anyOf`, as in vLLM's other libraries. Objects take the properties that are listed and no others
    unless the schema says which, without which small models add properties for ever; but not in a schema that has an
    `allOf`, whose parts would then exclude each other's.
    """
    made = deepcopy(dict(schema))
    reached = list(References(made).reached())
    if not any("allOf" in each for each in reached):
        for each in reached:
            if isinstance(each.get("properties"), dict):
                each.setdefault("additionalProperties", False)
    return made | {"x-guidance": {"coerce_one_of": True}}


def try_grammar(schema: str) -> None:
    """Make a grammar of a schema (JSON) and write with it. Raises ValueError with what keeps the engine from it."""
    import llguidance

    check_references(json.loads(schema))
    began = time.process_time()
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": True})
    matcher: Any = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
    slowest, draw = time.process_time() - began, random.Random(0)
    for _ in range(STEPS):
        began = time.process_time()
        mask = b"" if matcher.get_error() else matcher.compute_bitmask()
        slowest = max(slowest, time.process_time() - began)
        if error := matcher.get_error():
            raise ValueError(f"cannot be made a grammar: {error.splitlines()[0]}")
        if slowest > MAX_CPU_S:
            raise ValueError(f"takes {slowest:.2g} s to follow; at most {MAX_CPU_S} s are allowed")
        allowed = [8 * i + bit for i, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]
        if matcher.is_stopped() or not allowed:
            return
        matcher.consume_token(draw.choice(allowed))
