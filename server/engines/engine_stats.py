"""Counts that engines and the runners of reward models keep of their work. Metrics are read off them."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Share of KV pages in use, 0 to 1; prompt tokens looked up in the prefix cache and found there; preemptions."""

    kv_cache_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class RunnerStats:
    """Tokens that a reward model was asked to score, those it computed and those a cache or sharing saved; passes."""

    tokens_asked: int = 0
    tokens_computed: int = 0
    tokens_cached: int = 0
    passes: int = 0
