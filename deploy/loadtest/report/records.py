"""The record of one request, and its outcome.

All times are seconds of `time.perf_counter()`. Latencies count from the *scheduled* send: a request that the
schedule wanted at t and that could only go out at t + 1 s has waited that second too (Gil Tene's coordinated
omission). Latencies from the actual send have `from_send` in their names.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """Outcome of a request. Every request sent has exactly one."""

    COMPLETED = "completed"
    REJECTED = "rejected_429"
    HTTP_ERROR = "http_error"  # any other status than 200 and 429
    CONNECTION_ERROR = "connection_error"  # no response at all
    STREAM_ERROR = "stream_error"  # an error after the 200, or an answer cut short
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"  # by us: planned, or because the run was interrupted


@dataclass(slots=True)
class Record:
    """One request. Events that never happened are None, or NaN for times."""

    index: int
    class_name: str
    request_id: str
    scheduled: float
    slos: Mapping[str, float] = field(default_factory=dict)
    sent: float = math.nan
    end: float = math.nan
    chunks: list[float] = field(default_factory=list)
    streamed: bool = False
    outcome: Outcome | None = None
    status: int | None = None
    error: str = ""
    retry_after_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    tokens_counted: bool = True
    finish_reason: str | None = None
    guide: str | None = None
    score: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    spend: dict[str, float] = field(default_factory=dict)
    stopped_by: str | None = None
    text: str = ""

    @property
    def first(self) -> float | None:
        """Arrival of the first chunk with text; the end, if a completed answer had no such chunk."""
        if self.chunks:
            return self.chunks[0]
        return self.end if self.outcome is Outcome.COMPLETED else None

    @property
    def ttft(self) -> float | None:
        """Time to first text, from the scheduled send."""
        return None if self.first is None else self.first - self.scheduled

    @property
    def ttft_from_send(self) -> float | None:
        """Time to first text, from the actual send."""
        return None if self.first is None else self.first - self.sent

    @property
    def e2el(self) -> float:
        """Time to the end of the answer or to the failure, from the scheduled send."""
        return self.end - self.scheduled

    @property
    def e2el_from_send(self) -> float:
        """The same from the actual send."""
        return self.end - self.sent

    @property
    def queue(self) -> float:
        """Delay of the send after its schedule."""
        return self.sent - self.scheduled

    @property
    def itls(self) -> list[float]:
        """Gaps between chunks with text. A chunk may carry several tokens."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, as in `vllm bench serve`: (e2el - ttft) / (tokens - 1)."""
        if not self.chunks or self.output_tokens < 2:
            return None
        return (self.end - self.chunks[0]) / (self.output_tokens - 1)

    @property
    def good(self) -> bool:
        """True if it completed within its objectives (milliseconds). A missing TPOT is within any."""
        if self.outcome is not Outcome.COMPLETED:
            return False
        measured = {"ttft": self.ttft, "tpot": self.tpot, "e2el": self.e2el}
        return all((measured[name] or 0.0) * 1000 <= limit for name, limit in self.slos.items())

    def row(self, start: float) -> dict[str, Any]:
        """The line of the per-request JSONL. Times are seconds after `start`, durations milliseconds."""

        def ms(value: float | None) -> float | None:
            return None if value is None or math.isnan(value) else round(value * 1000, 4)

        return {
            "index": self.index,
            "class": self.class_name,
            "request_id": self.request_id,
            "outcome": self.outcome,
            "status": self.status,
            "error": self.error,
            "retry_after_s": self.retry_after_s,
            "scheduled_s": round(self.scheduled - start, 6),
            "sent_s": round(self.sent - start, 6),
            "end_s": round(self.end - start, 6),
            "client_queue_time_ms": ms(self.queue),
            "ttft_ms": ms(self.ttft),
            "ttft_from_send_ms": ms(self.ttft_from_send),
            "tpot_ms": ms(self.tpot),
            "e2el_ms": ms(self.e2el),
            "e2el_from_send_ms": ms(self.e2el_from_send),
            "itls_ms": [ms(gap) for gap in self.itls],
            "streamed": self.streamed,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "tokens_counted": self.tokens_counted,
            "finish_reason": self.finish_reason,
            "good": self.good,
            "guide": self.guide,
            "score": self.score,
            "rewards": self.rewards,
            "spend": self.spend,
            "stopped_by": self.stopped_by,
        }
