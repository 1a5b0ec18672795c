"""Counts of vLLM's scheduler that operators look at, kept without vLLM's own loggers."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from guiderail.server.engines.engine_stats import EngineStats


class Recorder(StatLoggerBase):  # type: ignore[misc]
    """Adds each step's counts to an EngineStats."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int, stats: EngineStats) -> None:
        self._stats = stats

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **more: Any) -> None:
        if scheduler_stats is not None:
            cache = scheduler_stats.prefix_cache_stats
            self._stats.kv_cache_usage = scheduler_stats.kv_cache_usage
            self._stats.prefix_queries += cache.queries
            self._stats.prefix_hits += cache.hits
        if iteration_stats is not None:
            self._stats.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        return
