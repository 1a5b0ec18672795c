"""Limits of a request and what it costs, counted alike for every guide."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class Stopwatch:
    """Wall time during which at least one of possibly many overlapping spans was open, in seconds."""

    def __init__(self) -> None:
        self._open = 0
        self._since = 0.0
        self._total = 0.0

    @contextmanager
    def span(self) -> Iterator[None]:
        """Count the time inside the block; overlapping blocks are counted once."""
        if self._open == 0:
            self._since = time.monotonic()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if self._open == 0:
                self._total += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        """Time so far, the span that is open now included."""
        return self._total + (time.monotonic() - self._since if self._open else 0.0)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request: a time.monotonic() deadline and a number of generated tokens."""

    deadline: float | None = None
    max_tokens_generated: int | None = None


@dataclass(slots=True)
class Spend:
    """Tokens, calls and time of one request, over all its answers.

    Tokens are the served model's, except `reward_tokens`, which are the reward models' (0 for rewards
    that read no tokens). `rollouts` are sequences given to the engine; `reward_calls` are score calls.
    `calibration_tokens` were generated for a calibration pool and are counted nowhere else; requests that
    share the pool do not pay for it again. `queued_s`: waited for admission.
    `mixed_tokens`: forward passes of policies that were mixed into sequences.
    """

    prompt_tokens: int = 0
    tokens_generated: int = 0
    tokens_accepted: int = 0
    calibration_tokens: int = 0
    rollouts: int = 0
    reward_calls: int = 0
    reward_tokens: int = 0
    mixed_tokens: int = 0
    queued_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    generation: Stopwatch = field(default_factory=Stopwatch)
    scoring: Stopwatch = field(default_factory=Stopwatch)
    working: Stopwatch = field(default_factory=Stopwatch)

    @property
    def tokens_discarded(self) -> int:
        """Generated and not in an answer. A guide may answer with tokens that it did not generate: none then."""
        return max(0, self.tokens_generated - self.tokens_accepted)

    def report(self) -> dict[str, float]:
        """Metrics of the response. Generation and scoring may overlap; waiting is the rest of the total."""
        total = time.monotonic() - self.started
        return {
            "prompt_tokens": self.prompt_tokens,
            "tokens_generated": self.tokens_generated,
            "tokens_accepted": self.tokens_accepted,
            "tokens_discarded": self.tokens_discarded,
            "calibration_tokens": self.calibration_tokens,
            "mixed_tokens": self.mixed_tokens,
            "rollouts": self.rollouts,
            "reward_calls": self.reward_calls,
            "reward_tokens": self.reward_tokens,
            "generation_s": round(self.generation.seconds, 4),
            "scoring_s": round(self.scoring.seconds, 4),
            "queued_s": round(self.queued_s, 4),
            "waiting_s": round(max(0.0, total - self.working.seconds), 4),
            "total_s": round(total, 4),
        }
