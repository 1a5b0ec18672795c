"""Prometheus metrics, all named here: guiderail:..., after the pattern of vLLM's."""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from guiderail.guides.core.budget import Spend
from guiderail.guides.scoring.selection_report import SelectionReport
from guiderail.server.engines.engine_stats import RunnerStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
NATS = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 10, 20)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Load:
    """The state of the server at the moment, which gauges show."""

    num_requests_running: int
    num_requests_waiting: int
    waiting_tokens: int
    engine_rows: int
    engine_up: bool
    kv_cache_usage_perc: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int


class Metrics:
    """One server's metrics in a registry of their own."""

    def __init__(self, model: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.in_flight = 0
        base = ("model_name",)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"guiderail:{name}", text, (*base, *labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"guiderail:{name}", text, (*base, *labels), registry=self.registry, buckets=buckets)

        self._model = model
        self._requests = counter("requests", "Requests by guide and outcome.", "guide", "outcome")
        self._tokens = counter(
            "tokens", "Tokens by guide and fate: prompt, accepted, discarded, calibration.", "guide", "fate"
        )
        self._gauges = {
            name: Gauge(f"guiderail:{name}", text, base, registry=self.registry)
            for name, text in (
                ("num_requests_running", "Requests being served."),
                ("num_requests_waiting", "Requests that wait for admission."),
                ("waiting_tokens", "Tokens that waiting requests may ask for."),
                ("engine_rows", "Rows open in the engine."),
                ("engine_up", "1 while the engine serves."),
                ("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1."),
                ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache since the engine's start."),
                ("prefix_cache_hits", "Prompt tokens found there."),
                ("preemptions", "Rows that lost their KV pages for want of memory, since the engine's start."),
            )
        }
        self._queue_time = histogram("request_queue_time_seconds", "Wait for admission.", SECONDS)
        self._restarts = counter("engine_restarts", "Times the engine was started again.")
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first committed text.", SECONDS, "guide")
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last byte.", SECONDS, "guide")
        self._batch = histogram("reward_batch_size", "Answers per batch.", SIZES, "reward")
        self._wait = histogram("reward_queue_time_seconds", "Wait of a score call.", SECONDS, "reward")
        self._failed = counter("reward_failures", "Score calls that failed.", "reward")
        self._runner = Gauge(
            "guiderail:reward_model_tokens",
            "Reward models' tokens since the start: asked for, computed, and saved by sharing or cache (cached).",
            (*base, "reward", "kind"),
            registry=self.registry,
        )
        self._calibrations = counter("calibrations", "Calibration samples used, by source.", "source")
        self._kl = histogram("selection_kl_nats", "Bound of an answer's KL, nats, where one is known.", NATS, "guide")
        self._ess = histogram("selection_effective_candidates", "Effective sample size of selection.", SIZES, "guide")
        self._warned = counter("selection_warnings", "Answers with a warning of reward over-optimisation.", "guide")
        self._restarts.labels(model)

    def arrived(self) -> None:
        """A request is served, or waits, from now on."""
        self.in_flight += 1

    def finished(self, guide: str, outcome: str, spend: Spend, seconds: float) -> None:
        """A request ended: "success", "error", "cancelled" or "overloaded" (refused with 429)."""
        self.in_flight -= 1
        self._requests.labels(self._model, guide, outcome).inc()
        self._e2e.labels(self._model, guide).observe(seconds)
        self._tokens.labels(self._model, guide, "prompt").inc(spend.prompt_tokens)
        self._tokens.labels(self._model, guide, "accepted").inc(spend.tokens_accepted)
        self._tokens.labels(self._model, guide, "calibration").inc(spend.calibration_tokens)
        self._tokens.labels(self._model, guide, "discarded").inc(spend.tokens_discarded)

    def rejected(self) -> None:
        """A request was refused before a guide ran: outcome "rejected"."""
        self._requests.labels(self._model, "none", "rejected").inc()

    def first_token(self, guide: str, seconds: float) -> None:
        """Committed text went out for the first time in a request."""
        self._ttft.labels(self._model, guide).observe(seconds)

    def score_batch(self, reward: str, answers: int) -> None:
        """A batch of so many answers goes to a reward."""
        self._batch.labels(self._model, reward).observe(answers)

    def score_wait(self, reward: str, seconds: float) -> None:
        """A score call waited so long for its batch."""
        self._wait.labels(self._model, reward).observe(seconds)

    def score_failed(self, reward: str) -> None:
        """A score call failed."""
        self._failed.labels(self._model, reward).inc()

    def calibrated(self, source: str) -> None:
        """A reward was calibrated on a sample from this source."""
        self._calibrations.labels(self._model, source).inc()

    def selected(self, guide: str, report: SelectionReport) -> None:
        """An answer was chosen."""
        if report.kl is not None:
            self._kl.labels(self._model, guide).observe(report.kl)
        if report.effective_sample_size is not None:
            self._ess.labels(self._model, guide).observe(report.effective_sample_size)
        if report.warnings:
            self._warned.labels(self._model, guide).inc()

    def restarted(self) -> None:
        """The engine was started again."""
        self._restarts.labels(self._model).inc()

    def queued(self, seconds: float) -> None:
        """A request was admitted after so long a wait."""
        self._queue_time.labels(self._model).observe(seconds)

    def render(self, load: Load, runners: Mapping[str, RunnerStats]) -> bytes:
        """The text of /metrics. `runners`: the counts of each reward model."""
        for reward, stats in runners.items():
            for kind in ("asked", "computed", "cached"):
                self._runner.labels(self._model, reward, kind).set(getattr(stats, f"tokens_{kind}"))
        for name, gauge in self._gauges.items():
            gauge.labels(self._model).set(getattr(load, name))
        return generate_latest(self.registry)
