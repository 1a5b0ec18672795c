"""Errors about fields that guides and the reward pipeline name by themselves: clients read where they are in a request."""

from typing import Any

import httpx
import pytest
from tabular_server import tabular_state

from guiderail.server.api.app import create_app

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "chat",
        {"guide": {"name": "transfer_q", "rollouts": 2, "baseline_reward": "nothing"}, "rewards": ["a"]},
        "alignment.guide.baseline_reward",
        "'alignment.guide.baseline_reward' must be the label of a reward of weight 0 in 'alignment.rewards'",
    ),
    (
        "text",
        {"guide": {"name": "deal", "instruction": "Be kind."}, "rewards": ["a"]},
        "alignment.guide.instruction",
        "'alignment.guide.instruction': a policy with another prompt needs a chat request",
    ),
    (
        "text",
        {"guide": {"name": "logit_mix", "policies": [{"model": "adapter"}, {"system": "Be kind."}]}},
        "alignment.guide.policies[1]",
        "'alignment.guide.policies[1]': a policy with another prompt needs a chat request",
    ),
    (
        "chat",
        {"guide": {"name": "best_of_n", "n": 3}, "rewards": ["a"], "select": {"name": "pessimism", "r_max": -9}},
        "alignment.select",
        "'alignment.select': a combined reward of ",
    ),
    (
        "chat",
        {"guide": {"name": "best_of_n", "n": 3}, "rewards": [{"name": "a", "weight": 1e300}]},
        "alignment.rewards[0].weight",
        "'alignment.rewards[0].weight' must be a finite number from -1e+09 to 1e+09",
    ),
]


@pytest.mark.parametrize(("route", "alignment", "param", "message"), CASES, ids=[case[2] for case in CASES])
async def test_the_field_is_named_by_its_path(route: str, alignment: Any, param: str, message: str) -> None:
    body = {"max_tokens": 4, "seed": 1, "alignment": alignment}
    body |= {"messages": [{"role": "user", "content": "q"}]} if route == "chat" else {"prompt": "q"}
    transport = httpx.ASGITransport(app=create_app(tabular_state()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/v1/chat/completions" if route == "chat" else "/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(message)
