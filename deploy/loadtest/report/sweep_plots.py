"""The plots of a sweep: the server under rising load."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from guiderail.loadtest.report.metrics_of_a_run import word
from guiderail.loadtest.report.plot_parts import (
    COLOURS,
    OUTCOME_COLOURS,
    RANKS,
    Plot,
    in_style,
    legend_above,
    milliseconds,
    new,
    svg,
)
from guiderail.loadtest.report.records import Outcome

Stage = dict[str, Any]
LOAD = "offered load (req/s)"


@in_style
def latency_against_load(result: dict[str, Any]) -> Plot:
    """Percentiles of latency at each load."""
    plot = Plot(
        "latency-load",
        "Latency against load",
        "Percentiles at each offered load, from the scheduled send. Past saturation the queue only grows, so that they "
        "depend on how long the load lasts.",
    )
    stages = [stage for stage in result["stages"] if stage["completed"]]
    if not stages:
        return replace(plot, missing="no request completed")
    figure, axes = new(1, 2, height=3.6)
    for axis, key, name in zip(axes, ("ttft", "e2el"), ("TTFT", "E2E"), strict=True):
        drawn = []
        for rank, label, colour in RANKS:
            line = [stage["latency_ms"][key]["percentiles"].get(word(rank)) for stage in stages]
            if None in line:  # not among the percentiles asked for
                continue
            axis.plot(_rates(stages), line, color=colour, label=label, marker="o")
            drawn += line
        milliseconds(axis, drawn, f"{name} (ms)")
        axis.set_xlabel(LOAD)
        axis.set_xlim(left=0)
    legend_above(axes[0], 3)
    return replace(plot, svg=svg(figure))


@in_style
def goodput_knee(result: dict[str, Any]) -> Plot:
    """Completed and good requests per second at each load."""
    plot = Plot(
        "goodput-knee",
        "Goodput knee",
        "Where completed requests leave the dashed line, the server no longer keeps up; where good ones do, it no "
        "longer meets the objectives. The knee is the load with the most of them. Short runs lie below the line, as "
        "their last answers come after the last send.",
    )
    stages = result["stages"]
    rates = _rates(stages)
    figure, (axis,) = new(height=3.6)
    axis.plot([0, max(rates)], [0, max(rates)], "--", color="#8a9099", label="offered", linewidth=1)
    completed = [stage["request_throughput"] for stage in stages]
    axis.plot(rates, completed, color=COLOURS[0], alpha=0.4, linewidth=5, label="completed")
    if stages[0]["goodput"] is not None:
        axis.plot(rates, [s["request_goodput"] for s in stages], "o-", color=COLOURS[2], label="good")
    axis.axvline(result["knee_rps"], color=COLOURS[1], linestyle=":", label=f"knee {result['knee_rps']:g}")
    if result["capacity_rps"] is not None:
        wanted = f"{100 * result['wanted_attainment']:g}% good up to {result['capacity_rps']:g}"
        axis.axvspan(0, result["capacity_rps"], color=COLOURS[2], alpha=0.08, label=wanted, linewidth=0)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(LOAD)
    axis.set_ylabel("req/s")
    axis.legend()
    return replace(plot, svg=svg(figure))


@in_style
def reward_against_load(result: dict[str, Any]) -> Plot:
    """Reward per second and per answer at each load."""
    plot = Plot(
        "reward-load",
        "Reward against load",
        "The sum of all scores a second (left), and the mean score of an answer (right), which falls if budgets or "
        "deadlines cut the search short under load.",
    )
    stages = [stage for stage in result["stages"] if stage["reward"]]
    if not stages:
        return replace(plot, missing="no answer carried a score")
    figure, axes = new(1, 2, height=3.6)
    axes[0].plot(_rates(stages), [s["reward"]["per_s"] for s in stages], "o-", color=COLOURS[3])
    axes[0].set_ylabel("reward per second")
    mean = np.array([s["reward"]["score"]["mean"] for s in stages])
    count = np.array([s["reward"]["score"]["count"] for s in stages])
    error = 1.96 * np.array([s["reward"]["score"]["std"] for s in stages]) / np.sqrt(count)
    axes[1].errorbar(_rates(stages), mean, error, fmt="o-", color=COLOURS[3], capsize=2, label="mean, 95% interval")
    axes[1].set_ylabel("reward per answer")
    axes[1].legend()
    for axis in axes:
        axis.set_xlabel(LOAD)
        axis.set_xlim(left=0)
    return replace(plot, svg=svg(figure))


@in_style
def outcomes_against_load(result: dict[str, Any]) -> Plot:
    """Shares of outcomes at each load."""
    plot = Plot("outcomes-load", "Outcomes against load", "How the requests of each load ended.")
    stages = [stage for stage in result["stages"] if stage["sent"]]
    if not stages:
        return replace(plot, missing="nothing was sent")
    figure, (axis,) = new(height=3.6)
    labels = [f"{rate:g}" for rate in _rates(stages)]
    floor = np.zeros(len(stages))
    for outcome in Outcome:
        part = np.array([100 * s["outcomes"][outcome] / s["sent"] for s in stages])
        if part.any():
            axis.bar(labels, part, bottom=floor, color=OUTCOME_COLOURS[outcome], label=outcome.value, width=0.7)
            floor += part
    axis.set_ylim(0, 100)
    axis.grid(axis="x", visible=False)
    axis.set_xlabel(LOAD)
    axis.set_ylabel("% of requests")
    legend_above(axis, 4)
    return replace(plot, svg=svg(figure))


def _rates(stages: Sequence[Stage]) -> list[float]:
    return [stage["request_rate"] for stage in stages]
