"""What an engine tells of itself: use of its KV cache and what prefix caching saves."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Share of KV pages in use, 0 to 1; prompt tokens looked up in the prefix cache and found there; preemptions."""

    kv_cache_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
