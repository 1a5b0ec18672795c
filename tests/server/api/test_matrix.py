"""Guide x prompter x transform x selection over HTTP: each pairing works as a whole, or is refused by name with a 400.

Policies are tables whose letters hold what ends an answer in URIAL's layout, so that what is scored, selected and shown has
to be cleaned alike; rewards are hashes of the text, so that any other text shows.
"""

import json
import math
from collections import Counter
from typing import Any

import httpx
import pytest
from every_guide import Values
from tabular_server import tabular_state

from guiderail.guides.prompters import PROMPTERS
from guiderail.guides.scoring import SELECTIONS
from guiderail.guides.scoring.chain import TRANSFORMS
from guiderail.server.api.app import create_app

GUIDES: dict[str, dict[str, Any]] = {
    "sampling": {},
    "best_of_n": {"n": 4},
    "speculative_rejection": {"n": 4},
    "controlled_decoding": {"k": 4, "block": 2},
    "transfer_q": {"top_k": 2, "lookahead": 2, "baseline": {"model": "adapter"}},
    "transfer_q-blocks": {"top_k": 4, "block": 2, "lookahead": 1, "baseline": {"system": "be kind"}},
    "args": {"top_k": 3},
    "deal": {"top_k": 2, "lookahead": 1},
    "deal-beams": {"top_k": 2, "beams": 2, "lookahead": 1, "instruction": "be brief"},
    "logit_mix": {"policies": [{"model": "adapter", "weight": -0.5}]},
}
PROMPTED: dict[str, dict[str, Any]] = {
    "template": {}, "urial": {"style": "brief"}, "system_message": {"preferences": ["be kind"]},
}  # fmt: skip
TRANSFORMED: dict[str, Any] = {
    "identity": "identity", "calibrated": "calibrated", "exp": ["calibrated", {"name": "exp", "t": 5}],
    "neg_exp": ["calibrated", "neg_exp"], "log": ["calibrated", "log"], "log_sigmoid": "log_sigmoid",
    "clip": {"name": "clip", "low": 0.2, "high": 0.8}, "standardize": "standardize",
}  # fmt: skip
SELECTED: dict[str, dict[str, Any]] = {
    "argmax": {}, "softmax": {"beta": 0.3}, "best_of_poisson": {"mu": 2}, "mbr": {"beta": 0.5}, "likelihood": {"beta": 0.2, "per": "sum"},
    "pessimism": {"beta": 0.2, "r_max": 200}, "f_divergence": {"divergence": "jensen_shannon", "beta": 0.2}, "tournament": {"format": "round_robin"},
}  # fmt: skip
LETTERS = {1: b"a", 2: b" b", 3: b"\n# Query:", 4: b"\n```\n"}


def test_the_matrix_is_whole() -> None:
    assert {name.partition("-")[0] for name in GUIDES} == set(tabular_state().guides)
    assert set(PROMPTED) == set(PROMPTERS)
    assert set(TRANSFORMED) == set(TRANSFORMS)
    assert set(SELECTED) == set(SELECTIONS)


def right(body: dict[str, Any], state: Any, before: int) -> None:
    """One answer of the right types, finite and cleaned, scored as it is shown, and an honest spend."""
    (choice,), (report,) = body["choices"], body["alignment"]["choices"]
    text, spend = choice["message"]["content"], body["alignment"]["spend"]
    assert choice["finish_reason"] in ("stop", "length")
    for label, salt in (("a", 1), ("b", 2)):
        assert report["rewards"][label] == Values(salt)[list(text.encode())]
        assert isinstance(report["transformed"][label], float)
        assert math.isfinite(report["transformed"][label])
    assert isinstance(report["score"], float)
    assert math.isfinite(report["score"])
    kl = report["diagnostics"]["kl"]
    assert kl is None or (math.isfinite(kl) and kl >= 0)
    assert state.engine.num_running() == 0
    assert state.engine.tokens - before == spend["tokens_generated"] + spend["calibration_tokens"]
    assert 0 < body["usage"]["completion_tokens"] == spend["tokens_accepted"] <= spend["tokens_generated"]
    json.dumps(body, allow_nan=False)


@pytest.mark.parametrize("name", GUIDES)
async def test_every_pairing_works_or_is_refused_by_name(name: str) -> None:
    state = tabular_state(end=0.2, texts=LETTERS)
    guide = {"name": name.partition("-")[0], **GUIDES[name]}
    statuses: Counter[tuple[str, int]] = Counter()
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for selection in SELECTED:
            for prompter in PROMPTED:
                for i, transform in enumerate(TRANSFORMED):
                    alignment = {
                        "guide": guide, "prompter": {"name": prompter, **PROMPTED[prompter]},
                        "rewards": [{"name": "a", "transform": TRANSFORMED[transform]}, "b"],
                        "select": {"name": selection, **SELECTED[selection]}, "calibration": {"n": 4},
                    }  # fmt: skip
                    chat = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 4, "seed": i}
                    before = state.engine.tokens
                    answer = await client.post("/v1/chat/completions", json=chat | {"alignment": alignment})
                    where = (name, prompter, transform, selection, answer.text)
                    statuses[selection, answer.status_code] += 1
                    if answer.status_code == 200:
                        right(answer.json(), state, before)
                        continue
                    error = answer.json()["error"]
                    assert (answer.status_code, error["param"]) == (400, "alignment.select"), where
                    assert f"'{guide['name']}'" in error["message"], where
                    assert state.engine.tokens == before, "nothing is generated for what is refused"
    every = len(PROMPTED) * len(TRANSFORMED)
    assert set(statuses.values()) == {every}, "a rule is valid for a guide or it is not"
    valid = {selection for selection, status in statuses if status == 200}
    assert valid >= {"argmax"}
    assert valid == set(SELECTED) or guide["name"] not in ("best_of_n", "sampling", "logit_mix")
