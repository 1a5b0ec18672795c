"""Every transform, combination and selection over HTTP on the real engine, streamed and not, and their 400s."""

import json
from typing import Any

import httpx
import pytest
from serving import Live

TRANSFORMS: list[Any] = [
    "identity",
    "calibrated",
    {"name": "exp", "t": 5},
    "neg_exp",
    "log",
    {"name": "log_sigmoid", "reference": {"quantile": 0.7}},
    {"name": "log_sigmoid", "reference": {"value": 0.2}, "temperature": 0.5},
    {"name": "log_sigmoid", "reference": {"answer": "I am so happy for you!"}},
    {"name": "clip", "low": -0.5, "high": 0.5},
    "standardize",
    {"name": "standardize", "mean": 0, "std": 2},
    ["calibrated", {"name": "exp", "t": 3}, {"name": "clip", "high": 2}],
]
COMBINES: list[Any] = [
    "sum",
    "and",
    "pointwise_min",
    {"name": "maxmin", "beta": 0.2},
    {"name": "constraints", "objective": "sentiment", "floors": {"length": -20}},
]
SELECTIONS: list[Any] = [
    "argmax",
    {"name": "softmax", "beta": 0.3},
    {"name": "best_of_poisson", "mu": 2},
    {"name": "mbr", "beta": 0.5},
    {"name": "likelihood", "beta": 0.01, "per": "token"},
    {"name": "likelihood", "beta": 0.01, "per": "sum"},
    {"name": "pessimism", "beta": 0.2, "r_max": 2},
    *({"name": "f_divergence", "divergence": d, "beta": 0.3} for d in
      ("reverse_kl", "forward_kl", "jensen_shannon", "total_variation")),
    {"name": "tournament", "format": "single_elimination"},
    {"name": "tournament", "format": "round_robin", "criterion": "Which is shorter?"},
]  # fmt: skip


def body(alignment: dict[str, Any], **more: Any) -> dict[str, Any]:
    base = {"guide": {"name": "best_of_n", "n": 4}, "return_candidates": True, "calibration": {"n": 6}}
    return {
        "messages": [{"role": "user", "content": "Say something kind."}],
        "max_tokens": 8,
        "seed": 7,
        "alignment": base | alignment,
    } | more


async def ask(live: Live, request: dict[str, Any]) -> dict[str, Any]:
    """The alignment report of the answer, which must be the same streamed and not."""
    async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
        whole = await client.post("/v1/chat/completions", json=request)
        assert whole.status_code == 200, whole.text
        text, report = "", None
        async with client.stream("POST", "/v1/chat/completions", json=request | {"stream": True}) as stream:
            assert stream.status_code == 200
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
                    report = chunk.get("alignment", report)
        told = whole.json()["alignment"]
        assert report is not None
        assert text == whole.json()["choices"][0]["message"]["content"]
        for each in (told, report):
            for key in ("spend", "choices"):
                assert each[key]
        assert report["choices"][0]["chosen"] == told["choices"][0]["chosen"]
        assert report["config"] == told["config"]
        result: dict[str, Any] = told
        return result


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
async def test_each_transform(live: Live, transform: Any) -> None:
    report = await ask(live, body({"rewards": [{"name": "sentiment", "transform": transform}]}))
    choice = report["choices"][0]
    assert choice["score"] == pytest.approx(choice["transformed"]["sentiment"])
    scores = [c["score"] for c in choice["candidates"]]
    raw = [c["rewards"]["sentiment"] for c in choice["candidates"]]
    assert choice["score"] == max(scores)
    assert all((s >= t) for s, r in zip(scores, raw, strict=True) for t, q in zip(scores, raw, strict=True) if r > q)
    steps = report["config"]["rewards"][0]["transform"]
    needs_pool = any(s["name"] == "calibrated" for s in steps) or (
        any("quantile" in str(s.get("reference")) or s == {"name": "standardize"} for s in steps)
    )
    assert (choice["calibration"] != {}) == needs_pool
    if needs_pool:
        assert choice["calibration"]["sentiment"]["n"] == 6
        assert choice["calibration"]["sentiment"]["source"] in ("drawn", "shared")


@pytest.mark.parametrize("combine", COMBINES, ids=str)
async def test_each_combination(live: Live, combine: Any) -> None:
    report = await ask(live, body({"rewards": ["sentiment", {"name": "length", "target": 5}], "combine": combine}))
    config = report["config"]["combine"]
    assert config["name"] == (combine if isinstance(combine, str) else combine["name"])
    choice = report["choices"][0]
    assert choice["score"] == max(c["score"] for c in choice["candidates"])


@pytest.mark.parametrize("select", SELECTIONS, ids=str)
async def test_each_selection(live: Live, select: Any) -> None:
    report = await ask(live, body({"rewards": ["sentiment"], "select": select}))
    choice = report["choices"][0]
    assert choice["diagnostics"]["kl"] >= 0
    if report["config"]["select"]["name"] in ("softmax", "f_divergence"):
        assert sum(c["weight"] for c in choice["candidates"]) == pytest.approx(1)
        assert 1 <= choice["diagnostics"]["effective_sample_size"] <= 4
    if report["config"]["select"]["name"] in ("mbr", "likelihood"):
        assert all(c["adjusted_score"] != c["score"] for c in choice["candidates"])


@pytest.mark.parametrize(
    ("alignment", "param"),
    [
        ({"rewards": [{"name": "sentiment", "transform": "sigmoid"}]}, "alignment.rewards[0].transform"),
        ({"rewards": [{"name": "sentiment", "transform": {"name": "exp", "t": -1}}]}, "alignment.rewards[0].transform"),
        ({"rewards": [{"name": "sentiment", "transform": ["calibrated", {"name": "clip"}]}]}, "alignment.rewards[0].transform[1]"),
        ({"rewards": [{"name": "sentiment", "transform": {"name": "log_sigmoid", "reference": {"quantile": 2}}}]}, "alignment.rewards[0].transform"),
        ({"rewards": [{"name": "sentiment", "transform": {"name": "standardize", "mean": 1}}]}, "alignment.rewards[0].transform"),
        ({"rewards": ["sentiment"], "combine": "maxmin"}, "alignment.combine"),
        ({"rewards": ["sentiment", "length"], "combine": {"name": "maxmin", "beta": 0}}, "alignment.combine.beta"),
        ({"rewards": ["sentiment", "length"], "combine": {"name": "constraints", "objective": "x", "floors": {"length": 1}}}, "alignment.combine"),
        ({"rewards": [{"name": "sentiment", "transform": "calibrated"}], "combine": "and"}, "alignment.combine"),
        ({"rewards": ["sentiment"], "select": {"name": "pessimism"}}, "alignment.select.r_max"),
        ({"rewards": ["sentiment"], "select": {"name": "pessimism", "r_max": -2}}, "alignment.select"),
        ({"rewards": ["sentiment"], "select": {"name": "f_divergence", "divergence": "hellinger"}}, "alignment.select.divergence"),
        ({"rewards": ["sentiment"], "select": {"name": "best_of_poisson", "mu": -1}}, "alignment.select.mu"),
        ({"rewards": ["sentiment"], "select": {"name": "likelihood", "beta": 1}}, "alignment.select.per"),
        ({"rewards": ["sentiment"], "select": {"name": "tournament", "format": "swiss"}}, "alignment.select.format"),
        ({"rewards": ["sentiment"], "select": {"name": "mbr", "betta": 1}}, "alignment.select.betta"),
        ({"rewards": ["sentiment"], "calibration": {"n": 1}}, "alignment.calibration.n"),
        ({"rewards": [{"name": "sentiment", "transform": "calibrated"}], "calibration": {"source": "stored"}}, "alignment.calibration.source"),
        ({"rewards": [{"name": "sentiment", "weight": 0}]}, "alignment.rewards"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_each_wrong_parameter_is_named(live: Live, alignment: dict[str, Any], param: str, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
        response = await client.post("/v1/chat/completions", json=body(alignment, stream=stream))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert error["message"]


async def test_equal_prompts_share_a_pool(live: Live) -> None:
    request = body({"rewards": [{"name": "sentiment", "transform": "calibrated"}], "calibration": {"n": 7}}, seed=99)
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
        first = (await client.post("/v1/chat/completions", json=request)).json()["alignment"]
        second = (await client.post("/v1/chat/completions", json=request)).json()["alignment"]
    assert first["choices"][0]["calibration"]["sentiment"] == {"source": "drawn", "n": 7}
    assert second["choices"][0]["calibration"]["sentiment"] == {"source": "shared", "n": 7}
    assert first["spend"]["calibration_tokens"] > 0
    assert second["spend"]["calibration_tokens"] == 0
    assert first["choices"][0]["transformed"] == second["choices"][0]["transformed"]


async def test_the_score_endpoint_transforms_and_combines(live: Live) -> None:
    request = {
        "inputs": [
            {"messages": [{"role": "user", "content": "How are you?"}], "answers": ["Great, thanks!", "Awful."]}
        ],
        "rewards": [
            {"name": "sentiment", "transform": {"name": "clip", "low": 0}},
            {"name": "length", "target": 2, "transform": "calibrated"},
        ],
        "combine": "pointwise_min",
        "calibration": {"n": 5},
        "max_tokens": 6,
    }
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
        response = await client.post("/v1/rewards/score", json=request)
        bad = await client.post("/v1/rewards/score", json=request | {"combine": "product"})
    assert response.status_code == 200, response.text
    scored = response.json()["data"][0]
    assert scored["calibration"]["length"]["n"] == 5
    for answer in scored["answers"]:
        assert answer["transformed"]["sentiment"] == max(0, answer["rewards"]["sentiment"])
        assert answer["score"] == pytest.approx(min(answer["transformed"].values()))
    assert response.json()["usage"]["calibration_tokens"] > 0
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "combine.name"
