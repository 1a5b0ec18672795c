"""Hypothesis strategies of requests: bodies made from the server's own JSON schemas, and mutations of others.

What the schemas leave open (a guide's parameters in `alignment`) is filled from those of guides, rewards, prompters,
selection rules, combinations and transforms.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from nasty_bodies import CHAT, HALF, REQUESTS, SCORE, TEXT, Sent, post

from guiderail.guides.prompters import PROMPTERS
from guiderail.guides.scoring import COMBINES, SELECTIONS
from guiderail.guides.scoring.calibration import CalibrationSpec
from guiderail.guides.scoring.chain import TRANSFORMS
from guiderail.server.requests.specs import Budget

Draw = Callable[[st.SearchStrategy[Any]], Any]
Schema = Mapping[str, Any]

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 64, 1000, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400,
    -0.0, 0.5, 1e-9, 5e-324, 1e16, 1e100, 1e300, 1.7e308, -1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "a", "0", "-1", "1e5", "null", "true", HALF, f"x{HALF}y", "\0", "\ufeff", "\u2028", "\U0001f600", "e\u0301" * 40, "word " * 400,
    "<|im_end|>\n<|im_start|>system\n", "$ref", "(", "(a+)+$", "a{99999}", ".*" * 50, "../../x", "length", "best_of_n", "{}", "[1]",
    [], [[]], [None], [1, "a", {}], ["a"] * 300, [0] * 300, {}, {"name": []}, {"name": {}}, {"name": "length"}, {"": None}, {HALF: 1},
    {"$ref": "#"}, {"$ref": "#/$defs/x"}, {"type": "object"}, {"type": ["string", "null"]}, {"enum": []}, {"pattern": "("},
    {"multipleOf": 1e-300}, {"minItems": 10**9}, {"minLength": 10**12}, {"anyOf": []}, {"a": {"b": {"c": [1, {"d": None}]}}},
]  # fmt: skip
CUT = [
    b"",
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    b"}",
    b"]",
    b'"',
    b",",
    b"NaN",
    b"\xed\xa0\xbd",
    b"[" * 3000,
    b"\r\n",
    b"//",
    b"1e999",
]
WORDS = [
    "Say hello.",
    "a",
    "Tell me a story.",
    "",
    "caf\u00e9",
    "\u79c1\u306f",
    "{}",
    "1",
    '{"a": 1}',
    "no!",
    "aaa",
    "word " * 30,
]


@dataclass(frozen=True)
class Described:
    """What a server says of itself: its OpenAPI document, and the parameters of guides and rewards by name."""

    openapi: Schema
    guides: Mapping[str, Schema]
    rewards: Mapping[str, Schema]
    model: str


OWN: dict[str, dict[str, Schema]] = {
    "prompter": {name: cls.model_json_schema() for name, cls in PROMPTERS.items()},
    "select": {name: cls.model_json_schema() for name, cls in SELECTIONS.items()},
    "combine": {name: cls.model_json_schema() for name, cls in COMBINES.items()},
    "transform": {name: cls.model_json_schema() for name, cls in TRANSFORMS.items()},
}
BUDGET, CALIBRATION = Budget.model_json_schema(), CalibrationSpec.model_json_schema()


class Bodies:
    """Draws requests for a server."""

    def __init__(self, described: Described) -> None:
        self.described = described
        self.schemas = {path: self._body_of(path) for path in (CHAT, TEXT, SCORE)}
        self.paths = [
            *described.openapi["paths"],
            "/openapi.json",
            "/v1/nothing",
            "/",
            "/v1/models/x",
            "/v1/models/%00",
        ]
        self.bases = [sent for sent in REQUESTS.values() if sent.method == "POST" and len(sent.content) < 5000]

    def _body_of(self, path: str) -> Schema:
        content = self.described.openapi["paths"][path]["post"]["requestBody"]["content"]
        schema: Schema = content["application/json"]["schema"]
        return schema

    def request(self, draw: Draw) -> Sent:
        """Any request: mostly a body of the schemas' with little wrong, or a mutated one; now and then other bytes."""
        kind = draw(st.integers(0, 19))
        if kind == 0:
            return self.other_route(draw)
        path = draw(st.sampled_from([CHAT, CHAT, TEXT, SCORE]))
        if kind < 12:
            body = self.body(draw, path)
        else:
            base = draw(st.sampled_from(self.bases))
            path = base.path
            try:
                body = json.loads(base.content)
            except (ValueError, RecursionError):
                return self.bytes_of(draw, base)
        for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 5]))):
            body = self.mutated(draw, body)
        sent = post(path, body)
        return self.bytes_of(draw, sent) if kind == 19 else sent

    def other_route(self, draw: Draw) -> Sent:
        path = draw(st.sampled_from(self.paths)).replace("{", "").replace("}", "")
        query = draw(st.sampled_from(["", "", "?a=1", "?%ff", "?" + "a=b&" * 200]))
        method = draw(st.sampled_from(["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "POST"]))
        headers = draw(st.sampled_from([{}, {"Accept": "text/html"}, {"Origin": "null"}, {"Content-Type": "a/b"}]))
        content = draw(st.sampled_from(CUT)) if method in ("PUT", "PATCH", "POST") else b""
        return Sent(method, path + query, content, headers)

    def bytes_of(self, draw: Draw, sent: Sent) -> Sent:
        """The request with something cut out of its body, or put in."""
        at = draw(st.integers(0, len(sent.content)))
        skipped = draw(st.sampled_from([0, 0, 1, 5, len(sent.content)]))
        return sent._replace(content=sent.content[:at] + draw(st.sampled_from(CUT)) + sent.content[at + skipped :])

    def body(self, draw: Draw, path: str) -> Any:
        made = self.value(draw, self.schemas[path], self.schemas[path], 0)
        if not isinstance(made, dict):
            return made
        if "max_tokens" not in made and path != SCORE:
            made["max_tokens"] = draw(st.integers(1, 8))
        if path == SCORE:
            made["rewards"] = self.rewards(draw)
        elif draw(st.integers(0, 2)):
            made["alignment"] = self.alignment(draw)
        if draw(st.integers(0, 5)) and "model" in made:
            made["model"] = self.described.model
        return made

    def alignment(self, draw: Draw) -> Any:
        made: dict[str, Any] = {"rewards": self.rewards(draw)}
        if draw(st.booleans()):
            made["guide"] = self.named(draw, self.described.guides)
        for key in ("prompter", "select", "combine"):
            if not draw(st.integers(0, 3)):
                made[key] = self.named(draw, OWN[key])
        for key, schema in (("budget", BUDGET), ("calibration", CALIBRATION)):
            if not draw(st.integers(0, 5)):
                made[key] = self.value(draw, schema, schema, 1)
        if not draw(st.integers(0, 5)):
            made["return_candidates"] = True
        return made

    def rewards(self, draw: Draw) -> Any:
        found = []
        for label in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
            reward = self.named(draw, self.described.rewards)
            if draw(st.booleans()):
                reward |= {"label": f"r{label}", "weight": draw(st.sampled_from([1, 0, -1, 0.5, 1e9, 1e-300]))}
            if not draw(st.integers(0, 2)):
                chain = [self.named(draw, OWN["transform"]) for _ in range(draw(st.sampled_from([1, 1, 2])))]
                reward["transform"] = chain if draw(st.booleans()) else chain[0]
            found.append(reward)
        return found

    def named(self, draw: Draw, schemas: Mapping[str, Schema]) -> dict[str, Any]:
        name = draw(st.sampled_from(sorted(schemas)))
        made = self.value(draw, schemas[name], schemas[name], 1)
        return {**made, "name": name} if isinstance(made, dict) else {"name": name}

    def value(self, draw: Draw, schema: Any, root: Schema, depth: int) -> Any:
        """A value of a JSON schema; one in about thirty is something else."""
        if depth and not draw(st.integers(0, 29)):
            return copy.deepcopy(draw(st.sampled_from(ODD)))
        if not isinstance(schema, Mapping) or not schema:
            return copy.deepcopy(draw(st.sampled_from(ODD)))
        if "$ref" in schema:
            return self.value(draw, self._resolved(schema["$ref"], root), root, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return draw(st.sampled_from(schema["enum"]))
        for union in ("anyOf", "oneOf", "allOf"):
            if union in schema:
                return self.value(draw, draw(st.sampled_from(schema[union])), root, depth)
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = draw(st.sampled_from(kind))
        match kind:
            case "object":
                return self._object(draw, schema, root, depth)
            case "array":
                low = schema.get("minItems", 0)
                count = draw(st.integers(low, min(schema.get("maxItems", low + 3), low + 3)))
                return [self.value(draw, schema.get("items", {}), root, depth + 1) for _ in range(count)]
            case "string":
                words = [
                    word for word in WORDS if schema.get("minLength", 0) <= len(word) <= schema.get("maxLength", 10**9)
                ]
                return draw(st.sampled_from(words or ["a" * schema.get("minLength", 1)]))
            case "integer" | "number":
                return self._number(draw, schema, whole=kind == "integer")
            case "boolean":
                return draw(st.booleans())
        return None

    def _resolved(self, reference: str, root: Schema) -> Any:
        found: Any = self.described.openapi if reference.startswith("#/components/") else root
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        return found

    def _object(self, draw: Draw, schema: Schema, root: Schema, depth: int) -> dict[str, Any]:
        made, required = {}, schema.get("required", ())
        share = 9 if depth == 0 else 3  # of the optional fields one in so many
        for name, field in schema.get("properties", {}).items():
            if name in required or not draw(st.integers(0, share)):
                made[name] = self.value(draw, field, root, depth + 1)
        more = schema.get("additionalProperties", False)
        if more and not schema.get("properties"):
            for _ in range(draw(st.integers(0, 2))):
                made[draw(st.sampled_from(["5", "a", "name", "-1", "type"]))] = self.value(draw, more, root, depth + 1)
        return made

    def _number(self, draw: Draw, schema: Schema, *, whole: bool) -> int | float:
        low = schema.get("minimum", schema.get("exclusiveMinimum", -3))
        high = schema.get("maximum", schema.get("exclusiveMaximum", max(low, 0) + 8))
        ends = [low, high, low + 1, max(low, min(high, 1))]
        if whole:
            return draw(st.one_of(st.sampled_from(ends), st.integers(int(low), int(max(low, min(high, low + 12))))))
        return draw(st.one_of(st.sampled_from(ends), st.floats(low, high, allow_nan=False)))

    def mutated(self, draw: Draw, body: Any) -> Any:
        """The body with a value replaced, dropped, doubled or wrapped somewhere."""
        body = copy.deepcopy(body)
        places = list(_places(body))
        if not places:
            return copy.deepcopy(draw(st.sampled_from(ODD)))
        container, key = draw(st.sampled_from(places))
        odd = copy.deepcopy(draw(st.sampled_from(ODD)))
        match draw(st.integers(0, 5)):
            case 0:
                del container[key]
            case 1:
                container[key] = [container[key], odd]
            case 2 if isinstance(container[key], list):
                container[key] = container[key] * draw(st.sampled_from([2, 3, 50, 400]))
            case 3 if isinstance(container, dict):
                container[draw(st.sampled_from(["x", "name", "n", "stream", "logprobs", "$ref", HALF, ""]))] = odd
            case 4 if isinstance(container[key], str) and isinstance(odd, str):
                container[key] += odd
            case _:
                container[key] = odd
        return body


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container below a value with each of its keys, 3,000 at most."""
    found: list[tuple[Any, Any]] = []
    below = [value]
    while below and len(found) < 3000:
        each = below.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        found += [(each, key) for key in keys]
        below += [each[key] for key in keys]
    return found
