"""Against Guiderail's own server (over a scripted engine): its alignment object is understood, its counts agree."""

import asyncio
import re

import httpx
from fakes import ScriptedEngine, make_state
from loadtest_harness import load_test
from serving import serving

from guiderail.loadtest.load.plan import Cancellation
from guiderail.loadtest.load.runner import Load
from guiderail.loadtest.load.traffic import TrafficClass

BEST = {"guide": {"name": "best_of_n", "n": 4}, "rewards": [{"name": "last_digit"}]}
CLASSES = [
    TrafficClass(name="plain", share=2, max_tokens=50),
    TrafficClass(name="best", alignment=BEST, max_tokens=3, body={"seed": 10}, cancellation_rate=0),
    TrafficClass(name="whole", alignment=BEST, max_tokens=3, body={"seed": 10}, stream=False, cancellation_rate=0),
    TrafficClass(name="wrong", share=0.5, alignment={"guide": {"name": "nonsense"}}),
]


async def test_rewards_spend_and_counts_are_those_of_the_server() -> None:
    words = [" and"] * 60
    state = make_state(ScriptedEngine(lambda seed: [f"w{seed}", *words], step_s=0.004))
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        hang_ups = Cancellation(0.5, chunks=(1, 1))
        result, (run,) = await load_test(
            url, CLASSES, Load(100.0, count=100), cancellation=hang_ups, slos={"e2el": 5e3}, model="fake"
        )
        async with asyncio.timeout(5):
            while state.engine.num_running() or 'num_requests_running{model_name="fake"} 0.0' not in (
                metrics := (await client.get("/metrics")).text
            ):
                await asyncio.sleep(0.02)

    def counted(guide: str, outcome: str) -> float:
        rows = re.findall(rf'guiderail:requests_total{{guide="{guide}",.*outcome="{outcome}"}} (\S+)', metrics)
        return float(rows[0]) if rows else 0.0

    plain, best, whole, wrong = (result["classes"][name] for name in ("plain", "best", "whole", "wrong"))
    assert plain["outcomes"]["cancelled"] > 5
    assert counted("sampling", "success") == plain["outcomes"]["completed"]
    assert counted("sampling", "cancelled") == plain["outcomes"]["cancelled"]
    assert counted("best_of_n", "success") == best["sent"] + whole["sent"]
    assert wrong["outcomes"]["http_error"] == wrong["http_status"]["400"] == wrong["sent"] > 0
    assert counted("none", "rejected") == wrong["sent"]
    assert "guide" in next(iter(wrong["error_messages"]))
    for group in (best, whole):
        assert group["outcomes"]["completed"] == group["sent"] > 5
        assert group["reward"]["score"]["min"] == group["reward"]["rewards"]["last_digit"] == 3.0  # seeds 10 to 13
        assert group["spend"]["discarded_share"] == 0.75
        assert group["spend"]["rollouts"] == 4 * group["sent"]
        assert 0 < group["spend"]["generation_share"] <= 1
        assert group["latency_ms"]["server_queue_time"]["count"] == group["sent"]
    assert plain["output_tokens"] == 50 * plain["outcomes"]["completed"]
    assert result["goodput"]["good"] == result["completed"]
    assert {record.guide for record in run.records if record.class_name == "best"} == {"best_of_n"}
    assert result["tokens_counted"]
