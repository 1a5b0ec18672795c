"""A saturation sweep: the same traffic at rising loads, and where the server stops keeping up.

Given rates, it runs those. With "auto" it first measures the throughput that a fixed number of users who never pause
get from the server (closed loop), then runs open loop at fractions of it, below and above 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from guiderail.loadtest.load.runner import Load
from guiderail.loadtest.report.result import Reporting

FRACTIONS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)


@dataclass(frozen=True, slots=True)
class Sweep:
    """`rates` in requests/s, or None to find them with `users` in a closed loop. `attainment` is the share of
    requests within their objectives that a load must reach to count as within capacity."""

    rates: Sequence[float] | None
    users: int = 64
    attainment: float = 0.95

    def first(self, base: Load) -> Load | None:
        """The load that finds the throughput; None where rates are given."""
        if self.rates is not None:
            return None
        return Load(max_concurrency=self.users, count=base.count, duration_s=base.duration_s)

    def loads(self, base: Load, saturation_rps: float | None) -> list[Load]:
        """The loads to run, ascending: `base` at each rate. `saturation_rps` is needed where no rates are given."""
        rates = self.rates
        if rates is None:
            assert saturation_rps is not None
            rates = [_round(saturation_rps * fraction) for fraction in FRACTIONS]
        return [
            Load(rate, base.burstiness, base.max_concurrency, base.count, base.duration_s) for rate in sorted(rates)
        ]


def sweep_result(
    stages: Sequence[dict[str, Any]], saturation: dict[str, Any] | None, sweep: Sweep, about: Reporting
) -> dict[str, Any]:
    """The result of a sweep, from the results of its stages (result.py).

    `knee`: the stage with the most goodput (throughput, if there are no objectives). `capacity`: the highest rate up
    to which every stage had the wanted attainment; None if none had, or without objectives.
    """
    measure = "request_throughput" if stages[0]["request_goodput"] is None else "request_goodput"
    knee = max(stages, key=lambda stage: stage[measure])
    capacity = None
    for stage in stages:
        goodput = stage["goodput"]
        if goodput is None or (goodput["attainment"] or 0.0) < sweep.attainment:
            break
        capacity = stage["request_rate"]
    return {
        "kind": "sweep",
        "date": stages[0]["date"],
        "label": about.label,
        "model_id": about.model,
        **about.metadata,
        "base_url": about.base_url,
        "seed": about.seed,
        "slos_ms": about.slos,
        "prompts": about.prompts,
        "saturation_rps": None if saturation is None else saturation["request_throughput"],
        "knee_rps": knee["request_rate"],
        "capacity_rps": capacity,
        "wanted_attainment": sweep.attainment,
        "interrupted": any(stage["interrupted"] for stage in stages),
        "stages": list(stages),
        "saturation": saturation,
    }


def _round(rate: float) -> float:
    """Round to three significant figures."""
    return float(f"{rate:.3g}") if math.isfinite(rate) else rate
