"""The JSON of a run: the keys of `vllm bench serve`, then ours.

vLLM's names keep vLLM's meaning, but latencies count from the scheduled send (records.py). A metric without
values is null, not 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from guiderail.loadtest.load.arrivals import Ramp
from guiderail.loadtest.load.runner import Run
from guiderail.loadtest.report.metrics_of_a_run import max_concurrent, max_tokens_per_s, summarize, word
from guiderail.loadtest.report.records import Outcome, Record

METRICS = ("ttft", "tpot", "itl", "e2el", "ttft_from_send", "e2el_from_send", "client_queue_time", "server_queue_time")
# vLLM's name for what is e2el here: its own e2el counts from the actual send
QUEUE_INCLUSIVE = "e2el_including_client_queue"


@dataclass(frozen=True, slots=True)
class Reporting:
    """Content and names of a result, from the flags."""

    label: str
    model: str
    base_url: str
    endpoint: str
    seed: int
    percentile_metrics: Sequence[str] = ("ttft", "tpot", "itl", "e2el")
    percentiles: Sequence[float] = (50.0, 90.0, 95.0, 99.0, 99.9)
    slos: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)


def result_of(run: Run, about: Reporting, *, detailed: bool = False) -> dict[str, Any]:
    """The result of one run. `detailed` adds vLLM's lists, with one entry per request in the order of sending."""
    load, records = run.load, run.records
    total = summarize(records, run.duration_s, about.percentiles)
    names = list(dict.fromkeys(record.class_name for record in records))
    classes = {
        name: summarize([r for r in records if r.class_name == name], run.duration_s, about.percentiles)
        for name in sorted(names)
    }
    ramp = load.rate if isinstance(load.rate, Ramp) else None
    outcomes = total["outcomes"]
    result = {
        "date": run.date.astimezone().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": about.label,
        "backend": about.label,
        "label": about.label,
        "model_id": about.model,
        "tokenizer_id": None,
        "num_prompts": total["sent"],
        **about.metadata,
        "request_rate": "inf" if load.offered_rps is None else load.offered_rps,
        "burstiness": "inf" if load.burstiness == float("inf") else load.burstiness,
        "max_concurrency": load.max_concurrency,
        **_ramp_keys(ramp),
        "duration": run.duration_s,
        "completed": outcomes[Outcome.COMPLETED],
        "failed": total["sent"] - outcomes[Outcome.COMPLETED] - outcomes[Outcome.CANCELLED],
        "total_input_tokens": total["input_tokens"],
        "total_output_tokens": total["output_tokens"],
        "request_throughput": total["request_throughput"],
        "request_goodput": total["goodput"]["request_goodput"] if total["goodput"] else None,
        "output_throughput": total["output_throughput"],
        "total_token_throughput": (total["input_tokens"] + total["output_tokens"]) / run.duration_s,
        "max_output_tokens_per_s": max_tokens_per_s(records),
        "max_concurrent_requests": max_concurrent(records),
        **_flat(total["latency_ms"], about),
        "kind": "run",
        "base_url": about.base_url,
        "endpoint": about.endpoint,
        "seed": about.seed,
        "slos_ms": about.slos,
        "prompts": about.prompts,
        "interrupted": run.interrupted,
        **{key: value for key, value in total.items() if key not in ("request_throughput", "output_throughput")},
        "classes": classes,
    }
    return result | (_lists(records) if detailed else {})


def _ramp_keys(ramp: Ramp | None) -> dict[str, Any]:
    if ramp is None:
        return {}
    return {"ramp_up_strategy": ramp.kind, "ramp_up_start_rps": ramp.start, "ramp_up_end_rps": ramp.end}


def _flat(latency: dict[str, Any], about: Reporting) -> dict[str, float | None]:
    keys: dict[str, float | None] = {}
    for name in about.percentile_metrics:
        metrics = latency["e2el" if name == QUEUE_INCLUSIVE else name]
        for kind in ("mean", "median", "std"):
            keys[f"{kind}_{name}_ms"] = metrics[kind]
        for percentile in about.percentiles:
            keys[f"p{word(percentile)}_{name}_ms"] = metrics["percentiles"][word(percentile)]
    return keys


def _lists(records: Sequence[Record]) -> dict[str, list[Any]]:
    return {
        "input_lens": [r.prompt_tokens or 0 for r in records],
        "output_lens": [r.output_tokens if r.outcome is Outcome.COMPLETED else 0 for r in records],
        "ttfts": [r.ttft or 0.0 for r in records],
        "itls": [r.itls for r in records],
        "latencies": [r.e2el for r in records],
        "start_times": [r.sent for r in records],
        "queue_times": [r.queue for r in records],
        "generated_texts": [r.text for r in records],
        "errors": [r.error for r in records],
    }
