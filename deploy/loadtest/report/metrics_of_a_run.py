"""Metrics of records: outcomes, latency distributions, goodput, rewards, and the use of tokens and time.

Latencies are those of completed requests, in milliseconds. Goodput follows DistServe (arXiv:2401.09670): requests
that completed within every objective, per second; errors of every kind are not good. Requests that we cancelled
ourselves are left out of its attainment, as neither a success nor a failure of the server.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from guiderail.loadtest.report.records import Outcome, Record

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)

Value = float | None

LATENCIES: dict[str, Callable[[Record], Value]] = {
    "ttft": lambda r: r.ttft,
    "tpot": lambda r: r.tpot,
    "e2el": lambda r: r.e2el,
    "ttft_from_send": lambda r: r.ttft_from_send,
    "e2el_from_send": lambda r: r.e2el_from_send,
    "client_queue_time": lambda r: r.queue,
    "server_queue_time": lambda r: r.spend.get("waiting_s"),
}


def distribution(values: Iterable[Value], percentiles: Sequence[float] = PERCENTILES) -> dict[str, Any]:
    """Count, mean, standard deviation, extremes and percentiles (linear between order statistics); None is left out.

    Without values everything but the count is None.
    """
    data = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(data):
        none: dict[str, Any] = dict.fromkeys(("mean", "std", "min", "median", "max"))
        return {"count": 0, **none, "percentiles": {word(p): None for p in percentiles}}
    return {
        "count": len(data),
        "mean": float(data.mean()),
        "std": float(data.std()),
        "min": float(data.min()),
        "median": float(np.median(data)),
        "max": float(data.max()),
        "percentiles": {word(p): float(v) for p, v in zip(percentiles, np.percentile(data, percentiles), strict=True)},
    }


def word(percentile: float) -> str:
    """A percentile as `vllm bench serve` writes it in keys: 99, 99.9."""
    return f"{percentile:g}"


def summarize(
    records: Sequence[Record], duration_s: float, percentiles: Sequence[float] = PERCENTILES
) -> dict[str, Any]:
    """The metrics of some requests that were sent within `duration_s`."""
    completed = [r for r in records if r.outcome is Outcome.COMPLETED]
    outcomes = Counter(r.outcome for r in records)
    tokens = sum(r.output_tokens for r in completed)

    def ms(values: Iterable[Value]) -> dict[str, Any]:
        return distribution((None if v is None else v * 1000 for v in values), percentiles)

    return {
        "sent": len(records),
        "outcomes": {outcome.value: outcomes[outcome] for outcome in Outcome},
        "http_status": dict(sorted(Counter(str(r.status) for r in records if r.status is not None).items())),
        "error_messages": dict(Counter(r.error for r in records if r.error).most_common(10)),
        "request_throughput": len(completed) / duration_s,
        "output_throughput": tokens / duration_s,
        "output_tokens": tokens,
        "input_tokens": sum(r.prompt_tokens or 0 for r in completed),
        "tokens_counted": all(r.tokens_counted for r in completed if r.streamed),
        "latency_ms": {
            **{name: ms(map(of, completed)) for name, of in LATENCIES.items()},
            "itl": ms(gap for r in completed for gap in r.itls),
            "rejection": ms(r.e2el for r in records if r.outcome is Outcome.REJECTED),
        },
        "goodput": _goodput(records, duration_s),
        "reward": _reward(completed, duration_s, percentiles),
        "spend": _spend(completed),
    }


def _goodput(records: Sequence[Record], duration_s: float) -> dict[str, Any] | None:
    if not any(r.slos for r in records):
        return None
    good = sum(r.good for r in records)
    counted = sum(r.outcome is not Outcome.CANCELLED for r in records)
    return {
        "good": good,
        "counted": counted,
        "attainment": good / counted if counted else None,
        "request_goodput": good / duration_s,
    }


def _reward(completed: Sequence[Record], duration_s: float, percentiles: Sequence[float]) -> dict[str, Any] | None:
    scored = [r for r in completed if r.score is not None]
    if not scored:
        return None
    scores = [r.score for r in scored if r.score is not None]
    labels = sorted({label for r in scored for label in r.rewards})
    return {
        "score": distribution(scores, percentiles),
        "per_s": sum(scores) / duration_s,
        "per_latency_s": float(np.mean([score / r.e2el for score, r in zip(scores, scored, strict=True)])),
        "rewards": {n: float(np.mean([r.rewards[n] for r in scored if n in r.rewards])) for n in labels},
    }


def _spend(completed: Sequence[Record]) -> dict[str, Any] | None:
    """Sums over the answers that carried a spend, and shares of them; shares of nothing are None."""
    told = [r for r in completed if r.spend]
    if not told:
        return None
    sums = {name: sum(r.spend.get(name, 0) for r in told) for name in sorted({n for r in told for n in r.spend})}

    def share(part: str, whole: str) -> float | None:
        return sums.get(part, 0) / sums[whole] if sums.get(whole) else None

    return {
        "requests": len(told),
        **sums,
        "discarded_share": share("tokens_discarded", "tokens_generated"),
        "generation_share": share("generation_s", "total_s"),
        "scoring_share": share("scoring_s", "total_s"),
        "waiting_share": share("waiting_s", "total_s"),
        "stopped_early": dict(Counter(r.stopped_by for r in told if r.stopped_by)),
    }


def max_concurrent(records: Sequence[Record]) -> int:
    """Most requests that were in flight at once."""
    steps = sorted([(r.sent, 1) for r in records] + [(r.end, -1) for r in records])
    return int(max(np.cumsum([step for _, step in steps]), default=0))


def max_tokens_per_s(records: Sequence[Record]) -> float:
    """Most chunks with text in a second, over seconds since the first send (`vllm bench serve` counts alike)."""
    times = np.array([t for r in records if r.outcome is Outcome.COMPLETED for t in r.chunks])
    if not len(times):
        return 0.0
    first = min(r.sent for r in records)
    return float(np.bincount((times - first).astype(int)).max())
