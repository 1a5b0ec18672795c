"""Every number of an alignment, at its extremes: refused by the path of its field, or computed right."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from tabular_server import tabular_state

from guiderail.guides.scoring import COMBINES, SELECTIONS
from guiderail.guides.scoring.calibration import CalibrationSpec
from guiderail.guides.scoring.chain import TRANSFORMS
from guiderail.server.api.app import create_app
from guiderail.server.requests.schemas import ChatRequest
from guiderail.server.requests.specs import Budget
from guiderail.server.settings import OperatorLimits

EXTREMES: list[int | float] = [
    5e-324, -5e-324, 2.3e-308, 1e-300, 1e-100, -1e-100, 1e100, -1e100, 1e101, 1e300, -1e300, 1.7e308, -1.7e308,
    0, -1, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 10**30,
]  # fmt: skip
STEPS = {"top_k": 2, "rollouts": 2, "lookahead": 1}
GUIDES: dict[str, dict[str, Any]] = {
    "sampling": {}, "best_of_n": {"n": 3}, "speculative_rejection": {"n": 3}, "args": {"top_k": 2},
    "controlled_decoding": {"k": 2, "block": 2}, "transfer_q": STEPS | {"baseline_reward": "b"},
    "deal": {"top_k": 2, "lookahead": 1},
    "logit_mix": {"policies": [{"model": "adapter"}], "tilt": [{"token": 2, "value": 1.0}]},
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "f_divergence": {"divergence": "forward_kl"}, "pessimism": {"r_max": 10}, "likelihood": {"beta": 1, "per": "sum"},
    "constraints": {"objective": "a", "floors": {"b": 0}}, "standardize": {"mean": 0, "std": 1}, "clip": {"low": 0},
}  # fmt: skip
TWO = [{"name": "a"}, {"name": "b"}]


def numbers(model: type[BaseModel]) -> Iterator[str]:
    """Names of the fields that take a number."""
    for name, schema in model.model_json_schema()["properties"].items():
        if {each.get("type") for each in schema.get("anyOf", [schema])} & {"number", "integer"}:
            yield name


def cases() -> Iterator[tuple[str, dict[str, Any], str]]:
    """(the field's path, an alignment with HERE in the field's place)."""
    plain = {"guide": {"name": "best_of_n", "n": 4}, "rewards": TWO, "select": "softmax"}
    state = tabular_state()
    for name, needed in GUIDES.items():
        rewards = {"rewards": [{"name": "a"}, {"name": "b", "weight": 0}]} if name == "transfer_q" else {"rewards": TWO}
        for field in numbers(state.guides[name].Params):
            spec = {"name": name} | needed | {field: "HERE"}
            if field == "interval":
                spec.pop("segments", None)
            yield f"alignment.guide.{field}", {"guide": spec} | rewards
    mixed = {"guide": {"name": "logit_mix", "policies": [{"model": "adapter", "weight": "HERE"}]}}
    yield "alignment.guide.policies[0].weight", mixed
    for field in ("token", "value"):
        tilt = {"token": 2, "value": 1.0} | {field: "HERE"}
        yield f"alignment.guide.tilt[0].{field}", {"guide": {"name": "logit_mix", "tilt": [tilt]}}
    for name, rule in SELECTIONS.items():
        for field in numbers(rule):
            other = {"beta": None, "mu": None} if field == "kl" else {}
            yield (
                f"alignment.select.{field}",
                plain | {"select": {"name": name} | NEEDED.get(name, {}) | other | {field: "HERE"}},
            )
    tokens = {"guide": {"name": "args", "top_k": 2}, "rewards": TWO}
    yield "alignment.select.beta", tokens | {"select": {"name": "softmax", "beta": "HERE"}}
    for name, combine in COMBINES.items():
        for field in numbers(combine):
            yield (
                f"alignment.combine.{field}",
                plain | {"combine": {"name": name} | NEEDED.get(name, {}) | {field: "HERE"}},
            )
        spec = {"name": name} | NEEDED.get(name, {})
        weighed = [{"name": "a", "weight": "HERE"}, {"name": "b"}]
        yield "alignment.rewards[0].weight", plain | {"combine": spec, "rewards": weighed}
    yield (
        "alignment.combine.floors",
        plain | {"combine": {"name": "constraints", "objective": "a", "floors": {"b": "HERE"}}},
    )
    references = [{"quantile": "HERE"}, {"value": "HERE"}]
    for name, transform in TRANSFORMS.items():
        for field in numbers(transform):
            step = {"name": name} | NEEDED.get(name, {}) | {field: "HERE"}
            yield "alignment.rewards[0].transform", plain | {"rewards": [{"name": "a", "transform": step}]}
    for reference in references:
        step = {"name": "log_sigmoid", "reference": reference}
        yield "alignment.rewards[0].transform", plain | {"rewards": [{"name": "a", "transform": step}]}
    for field in numbers(CalibrationSpec):
        yield f"alignment.calibration.{field}", plain | {"calibration": {field: "HERE"}}
    for field in numbers(Budget):
        yield f"alignment.budget.{field}", plain | {"budget": {field: "HERE"}}


CASES = list(cases())


def finite(value: object) -> bool:
    """True if all numbers in JSON are finite: what cannot be computed must not be passed off as a score."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("path", "alignment"), CASES, ids=[f"{path}-{i}" for i, (path, _) in enumerate(CASES)])
async def test_an_extreme_number_is_refused_by_name_or_computed(path: str, alignment: dict[str, Any]) -> None:
    limits = OperatorLimits(max_candidates=16)
    transport = httpx.ASGITransport(create_app(tabular_state(end=0.3, limits=limits)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
        computed = 0
        for number in EXTREMES:
            text = json.dumps(alignment).replace('"HERE"', json.dumps(number))
            body = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 3, "seed": 1}
            body |= {"alignment": json.loads(text) | {"return_candidates": True}}
            answer = await client.post("/v1/chat/completions", json=body)
            if answer.status_code == 200:
                computed += 1
                assert finite(answer.json()), (number, answer.text)
            elif answer.status_code == 504:
                assert path == "alignment.budget.deadline_s"
            else:
                error = answer.json()["error"]
                assert answer.status_code == 400, (number, answer.text)
                named = {path, path.rpartition(".")[0]} | ({"alignment.combine"} if path.endswith("weight") else set())
                assert error["param"].startswith(tuple(named - {"alignment"})), (number, error)
    # A threshold is compared, never computed with: whatever it is, it must not be taken for none.
    assert computed < len(EXTREMES) or path == "alignment.guide.threshold", "a field without bounds"


SAMPLING = list(numbers(ChatRequest))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("field", SAMPLING)
@pytest.mark.parametrize("guide", [{"name": "sampling"}, {"name": "args", "top_k": 2}], ids=["sampling", "args"])
async def test_extreme_sampling_is_refused_by_name_or_done(field: str, guide: dict[str, Any]) -> None:
    transport = httpx.ASGITransport(create_app(tabular_state(end=0.3)))
    alignment = {"guide": guide, "rewards": TWO, "select": {"name": "softmax", "beta": 0.1}}
    more: dict[str, Any] = {"logprobs": True} if field == "top_logprobs" else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
        for number in EXTREMES:
            body = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 3, "seed": 1, "alignment": alignment}
            answer = await client.post("/v1/chat/completions", json=body | more | {field: number})
            if answer.status_code == 200:
                assert finite(answer.json()), (number, answer.text)
            else:
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) in ((400, field), (400, "max_tokens")), (
                    number,
                    answer.text,
                )
