"""Schedule of requests: Poisson, gamma and constant arrivals, at a steady or a changing rate.

A process of unit rate is drawn, then its clock is warped to the rate curve: if S_1 < S_2 < ... are its arrivals and
L(t) is the integral of the rate up to t, the times L^-1(S_k) arrive at the rate L'(t) (time rescaling; Cinlar,
Introduction to Stochastic Processes, 1975, section 4.7). Gaps of the unit process are gamma with shape `burstiness`
and mean 1: exponential at 1 (Poisson arrivals), constant at infinity, more bursty below 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ramp:
    """A rate that goes from `start` to `end` requests/s, linearly or by a constant factor per second."""

    kind: Literal["linear", "exponential"]
    start: float
    end: float

    def span(self, count: int) -> float:
        """Seconds in which the ramp sends `count` requests."""
        if self.start == self.end:
            return count / self.start
        if self.kind == "linear":
            return 2 * count / (self.start + self.end)
        return count * math.log(self.end / self.start) / (self.end - self.start)

    def inverse(self, sent: Times, span: float) -> Times:
        """Times at which `sent` requests have been sent on average, if the ramp takes `span` seconds."""
        a, b = self.start, self.end
        if a == b:
            return sent / a
        if self.kind == "linear":
            slope = (b - a) / span
            # rounding may put the last arrival of a falling ramp just past the point where the rate ends
            return np.asarray((np.sqrt(np.maximum(a * a + 2 * slope * sent, 0.0)) - a) / slope)
        growth = math.log(b / a) / span
        return np.asarray(np.log1p(growth / a * sent) / growth)

    def total(self, span: float) -> float:
        """Requests that the ramp sends in `span` seconds on average."""
        return span / self.span(1)


def arrival_times(
    rng: np.random.Generator,
    *,
    rate: float | Ramp,
    burstiness: float = 1.0,
    count: int | None = None,
    duration_s: float | None = None,
) -> Times:
    """Arrival times in seconds after the start, ascending.

    Up to `count` requests, within `duration_s`; at least one of them must be given, and `count` if the rate is
    infinite (then all arrive at 0). With `count` alone the mean rate is met exactly, as in `vllm bench serve`: the
    times are scaled so that the last request arrives at its expected time. Rates are requests/s, > 0.
    """
    ramp = Ramp("linear", rate, rate) if isinstance(rate, int | float) else rate
    if math.isinf(ramp.start):
        assert count is not None
        return np.zeros(count)
    if duration_s is None:
        assert count is not None
        sent = np.cumsum(_gaps(rng, burstiness, count))
        return ramp.inverse(sent * (count / sent[-1]), ramp.span(count))
    expected = ramp.total(duration_s)
    sent = np.zeros(0)
    while not len(sent) or sent[-1] < expected:
        more = _gaps(rng, burstiness, int(expected + 4 * math.sqrt(expected) + 16))
        sent = np.concatenate([sent, (sent[-1] if len(sent) else 0.0) + np.cumsum(more)])
    return ramp.inverse(sent[sent < expected][:count], duration_s)


def _gaps(rng: np.random.Generator, burstiness: float, count: int) -> Times:
    if math.isinf(burstiness):
        return np.ones(count)
    return rng.gamma(burstiness, 1 / burstiness, count)
