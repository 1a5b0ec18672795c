"""Prometheus metrics, all named here: guiderail:..., after the pattern of vLLM's."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from guiderail.guides.spend import Spend
from guiderail.server.rewards.stats import RunnerStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """One server's metrics in a registry of their own."""

    def __init__(self, model: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        base = ("model_name",)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"guiderail:{name}", text, (*base, *labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"guiderail:{name}", text, (*base, *labels), registry=self.registry, buckets=buckets)

        self._model = model
        self._requests = counter("requests", "Requests by guide and outcome.", "guide", "outcome")
        self._tokens = counter("tokens", "Tokens by guide and fate: prompt, accepted, discarded.", "guide", "fate")
        self._running = Gauge("guiderail:num_requests_running", "Requests being served.", base, registry=self.registry)
        self._rows = Gauge("guiderail:engine_rows", "Rows open in the engine.", base, registry=self.registry)
        self._up = Gauge("guiderail:engine_up", "1 while the engine serves.", base, registry=self.registry)
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
        self._running.labels(model)
        self._restarts.labels(model)

    def arrived(self) -> None:
        """A request is being served from now on."""
        self._running.labels(self._model).inc()

    def finished(self, guide: str, outcome: str, spend: Spend, seconds: float) -> None:
        """A request ended: "success", "error", "cancelled" or "rejected"."""
        self._running.labels(self._model).dec()
        self._requests.labels(self._model, guide, outcome).inc()
        self._e2e.labels(self._model, guide).observe(seconds)
        self._tokens.labels(self._model, guide, "prompt").inc(spend.prompt_tokens)
        self._tokens.labels(self._model, guide, "accepted").inc(spend.tokens_accepted)
        self._tokens.labels(self._model, guide, "discarded").inc(spend.tokens_generated - spend.tokens_accepted)

    def rejected(self) -> None:
        """A request was refused before a guide ran."""
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

    def restarted(self) -> None:
        """The engine was started again."""
        self._restarts.labels(self._model).inc()

    def render(self, engine_rows: int, engine_up: bool, runners: Mapping[str, RunnerStats]) -> bytes:
        """The text of /metrics. `runners`: the counts of each reward model."""
        for reward, stats in runners.items():
            for kind in ("asked", "computed", "cached"):
                self._runner.labels(self._model, reward, kind).set(getattr(stats, f"tokens_{kind}"))
        self._rows.labels(self._model).set(engine_rows)
        self._up.labels(self._model).set(engine_up)
        return generate_latest(self.registry)
