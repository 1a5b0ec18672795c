"""Counts that a reward model's backend keeps."""

from dataclasses import dataclass


@dataclass(slots=True)
class RunnerStats:
    """Since the start: tokens that were to be scored, that were computed, and that sharing or the cache saved."""

    tokens_asked: int = 0
    tokens_computed: int = 0
    tokens_cached: int = 0
    passes: int = 0
