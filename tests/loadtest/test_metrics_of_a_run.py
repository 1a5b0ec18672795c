"""Contents of a result: percentiles, goodput, rewards and spend, and the keys of `vllm bench serve`."""

import json

import numpy as np
import pytest
from loadtest_harness import kind, load_test
from timed_server import Scripted

from guiderail.loadtest.load.arrivals import Ramp
from guiderail.loadtest.load.runner import Load
from guiderail.loadtest.report import metrics_of_a_run
from guiderail.loadtest.report.records import Outcome, Record
from guiderail.loadtest.report.result import Reporting
from guiderail.loadtest.report.saving import json_text, requests_text, result_path, save

# Keys of vllm bench serve 0.32 for a chat endpoint, --save-result --save-detailed --percentile-metrics
# ttft,tpot,itl,e2el --metric-percentiles 99,99.9. Without --save-detailed the lists are gone.
VLLM_LISTS = [
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "latencies",
    "start_times",
    "queue_times",
    "generated_texts",
    "errors",
]
VLLM_KEYS = [
    "date",
    "endpoint_type",
    "backend",
    "label",
    "model_id",
    "tokenizer_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
] + [
    f"{kind}_{metric}_ms"
    for metric in ("ttft", "tpot", "itl", "e2el")
    for kind in ("mean", "median", "std", "p99", "p99.9")
]


def record(**fields: object) -> Record:
    made = Record(0, "c", "id", scheduled=10.0, sent=10.0, end=11.0, outcome=Outcome.COMPLETED)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_percentiles_are_numpys_and_reach_p99_9() -> None:
    values = np.random.default_rng(0).lognormal(size=5000)
    made = metrics_of_a_run.distribution([*values, None])
    assert made["count"] == 5000
    for rank in (50, 90, 95, 99, 99.9):
        assert made["percentiles"][f"{rank:g}"] == pytest.approx(np.percentile(values, rank))
    assert metrics_of_a_run.distribution([None])["mean"] is None


@pytest.mark.parametrize(
    ("slos", "fields", "good"),
    [
        ({"ttft": 500}, {"chunks": [10.5]}, True),
        ({"ttft": 499}, {"chunks": [10.5]}, False),
        ({"ttft": 500}, {"chunks": [10.5], "scheduled": 9.9}, False),  # the schedule counts, not the send
        ({"e2el": 1000}, {}, True),
        ({"e2el": 999}, {}, False),
        ({"tpot": 100}, {"chunks": [10.5], "output_tokens": 6}, True),
        ({"tpot": 99}, {"chunks": [10.5], "output_tokens": 6}, False),
        ({"tpot": 0}, {"chunks": [10.5], "output_tokens": 1}, True),  # there is none
        ({"e2el": 5000}, {"outcome": Outcome.STREAM_ERROR}, False),
        ({"e2el": 5000}, {"outcome": Outcome.REJECTED}, False),
        ({"e2el": 5000}, {"outcome": Outcome.TIMEOUT}, False),
        ({}, {}, True),
    ],
)
def test_a_good_request_completes_within_every_objective(slos: dict, fields: dict, good: bool) -> None:
    assert record(slos=slos, **fields).good is good


def test_goodput_counts_per_second_and_leaves_cancelled_requests_out() -> None:
    some = [record(slos={"e2el": 2000})] * 6 + [record(slos={"e2el": 1})] * 2
    some += [record(slos={"e2el": 2000}, outcome=Outcome.CANCELLED)] * 2
    made = metrics_of_a_run.summarize(some, duration_s=3.0)["goodput"]
    assert made == {"good": 6, "counted": 8, "attainment": 0.75, "request_goodput": 2.0}
    assert metrics_of_a_run.summarize([record()], 1.0)["goodput"] is None


async def test_reward_and_spend_come_from_the_alignment_object(server: Scripted) -> None:
    classes = [kind("plain", 1), kind("whole", 1, stream=False, score=2.0), kind("guided", 2, score=0.5, tokens=10)]
    result, (run,) = await load_test(server, classes, Load(200.0, count=60))
    guided, whole, plain = (result["classes"][name] for name in ("guided", "whole", "plain"))
    assert plain["reward"] is None
    assert plain["spend"] is None
    n = guided["sent"]
    assert guided["reward"]["score"]["mean"] == guided["reward"]["rewards"]["length"] == 0.5
    assert guided["reward"]["per_s"] == pytest.approx(0.5 * n / run.duration_s)
    assert whole["reward"]["score"]["mean"] == 2.0
    assert result["reward"]["per_s"] == pytest.approx(guided["reward"]["per_s"] + whole["reward"]["per_s"])
    latencies = [r.e2el for r in run.records if r.class_name == "guided"]
    assert guided["reward"]["per_latency_s"] == pytest.approx(np.mean([0.5 / s for s in latencies]))
    spend = guided["spend"]
    assert (spend["tokens_accepted"], spend["tokens_discarded"], spend["requests"]) == (10 * n, 30 * n, n)
    assert (spend["discarded_share"], spend["scoring_share"], spend["waiting_share"]) == pytest.approx((0.75, 0.3, 0.1))
    assert guided["latency_ms"]["server_queue_time"]["median"] == pytest.approx(100)
    assert {r.guide for r in run.records if r.class_name == "guided"} == {"best_of_n"}


async def test_the_json_has_vllms_keys_and_survives_a_round_trip(server: Scripted, tmp_path) -> None:  # type: ignore[no-untyped-def]
    about = Reporting("openai-chat", "org/scripted", server.url, "/v1/chat/completions", 0)
    plain, _ = await load_test(server, [kind(tokens=4, itl=0.002)], Load(100.0, count=12))
    result, runs = await load_test(server, [kind(tokens=4, itl=0.002)], Load(100.0, count=12), detailed=True)
    assert set(VLLM_KEYS) <= set(plain)
    assert not set(VLLM_LISTS) & set(plain)
    assert set(VLLM_KEYS) | set(VLLM_LISTS) <= set(result)
    assert {len(result[name]) for name in VLLM_LISTS} == {12}
    assert result["itls"][0] == runs[0].records[0].itls
    assert result["generated_texts"] == ["w w w w "] * 12
    assert result["total_input_tokens"] == 12 * 7
    path = result_path(str(tmp_path / "new"), None, about, result)
    assert path.name == f"openai-chat-100.0qps-scripted-{result['date']}.json"
    save(path, json_text(result))
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    save(path.with_suffix(".jsonl"), requests_text(runs))
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(12))
    one, kept = lines[3], runs[0].records[3]
    assert one["ttft_ms"] == pytest.approx(1000 * (kept.ttft or 0), abs=1e-3)
    assert one["scheduled_s"] == pytest.approx(kept.scheduled - runs[0].start, abs=1e-5)
    assert one["outcome"] == "completed"


async def test_names_of_files_tell_the_load(server: Scripted) -> None:
    about = Reporting("lab", "m", server.url, "/v1/completions", 0)
    ramp, _ = await load_test(server, [kind()], Load(Ramp("linear", 50, 150), count=10))
    assert (ramp["request_rate"], ramp["ramp_up_start_rps"], ramp["ramp_up_strategy"]) == (100, 50, "linear")
    assert result_path(None, None, about, ramp).name == f"lab-ramp-up-linear-50qps-150qps-m-{ramp['date']}.json"
    closed, _ = await load_test(server, [kind()], Load(max_concurrency=2, count=3))
    assert result_path(None, None, about, closed).name == f"lab-infqps-concurrency2-m-{closed['date']}.json"
    assert result_path(None, "x.json", about, closed).name == "x.json"


def test_concurrency_and_token_peaks() -> None:
    some = [record(sent=0.0, end=2.0, chunks=[0.5, 1.2, 1.3]), record(sent=1.0, end=3.0, chunks=[1.9])]
    some.append(record(sent=3.0, end=4.0))
    assert metrics_of_a_run.max_concurrent(some) == 2
    assert metrics_of_a_run.max_tokens_per_s(some) == 3
    assert metrics_of_a_run.max_concurrent([]) == metrics_of_a_run.max_tokens_per_s([]) == 0
