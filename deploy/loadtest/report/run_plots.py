"""The plots of single runs, and of all requests of a sweep."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from numpy.typing import NDArray

from guiderail.loadtest.load.runner import Run
from guiderail.loadtest.report.plot_parts import (
    MANY,
    OUTCOME_COLOURS,
    RANKS,
    Plot,
    colours,
    in_style,
    legend_above,
    milliseconds,
    new,
    svg,
)
from guiderail.loadtest.report.records import Outcome, Record

Floats = NDArray[np.float64]


@in_style
def latency_over_time(run: Run) -> Plot:
    """Percentiles of latency in slices of the run."""
    plot = Plot(
        "latency-time",
        "Latency over time",
        "Percentiles of the requests scheduled in each slice of the run. A rising line means a growing queue.",
    )
    done = _completed(run.records)
    if not done:
        return _missing(plot, "no request completed")
    at = np.array([record.scheduled - run.start for record in done])
    edges = np.linspace(0, max(at.max(), 1e-3) * 1.0001, max(2, min(40, len(done) // 25) + 1))
    which = np.digitize(at, edges) - 1
    middle = (edges[1:] + edges[:-1]) / 2
    figure, axes = new(2, 1, share_x=True, height=4.2)
    for axis, name, values in zip(axes, ("TTFT", "E2E"), (_ms([r.ttft for r in done]), _e2el(done)), strict=True):
        slices = [(middle[i], values[which == i]) for i in range(len(middle)) if (which == i).any()]
        drawn = []
        for rank, label, colour in RANKS:
            line = [float(np.percentile(part, rank)) for _, part in slices]
            axis.plot([t for t, _ in slices], line, color=colour, label=label, marker="o", markersize=2.5)
            drawn += line
        milliseconds(axis, drawn, f"{name} (ms)")
    legend_above(axes[0], 3)
    axes[1].set_xlabel("seconds since the start (scheduled send)")
    return _drawn(plot, svg(figure))


@in_style
def latency_curve(run: Run) -> Plot:
    """All percentiles of latency, the tail stretched."""
    plot = Plot(
        "latency-curve",
        "Latency by percentile",
        "End-to-end latency from the scheduled send. Dashed: from the actual send, which hides time spent waiting to "
        "be sent.",
    )
    done = _completed(run.records)
    if not done:
        return _missing(plot, "no request completed")
    figure, (axis,) = new(height=4.2)
    drawn: list[float] = []
    for name, colour in colours([record.class_name for record in run.records]).items():
        if mine := [record for record in done if record.class_name == name]:
            drawn += _curve(axis, _e2el(mine), colour, name, "-")
    drawn += _curve(axis, _ms([r.e2el_from_send for r in done]), "#5b5b5b", "all, from the actual send", "--")
    ticks = [q for q in (0, 50, 90, 99, 99.9, 99.99) if q == 0 or 1 / (1 - q / 100) <= 2 * len(done)]
    axis.set_xscale("log")
    axis.set_xticks([1 / (1 - q / 100) for q in ticks], [f"{q:g}" for q in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("percentile")
    milliseconds(axis, drawn, "E2E (ms)")
    axis.legend()
    return _drawn(plot, svg(figure))


def _curve(axis: Axes, values: Floats, colour: str, label: str, style: str) -> list[float]:
    ordered = np.sort(values)
    above = len(ordered) / (len(ordered) - np.arange(len(ordered)))  # 1 / (1 - q)
    axis.plot(above, ordered, color=colour, label=label, linestyle=style, drawstyle="steps-post")
    return [float(ordered[0]), float(ordered[-1])]


@in_style
def reward_against_latency(runs: Sequence[Run]) -> Plot:
    """Every scored answer by its latency and its score."""
    plot = Plot(
        "reward-latency",
        "Reward against latency",
        "Each dot is an answer; the large mark is the class's mean, its bars the quartiles. Up and to the left is "
        "better. Classes with different rewards have different scales.",
    )
    scored = [r for run in runs for r in _completed(run.records) if r.score is not None]
    if not scored:
        return _missing(plot, "no answer carried a score (its alignment object names no reward, or there is none)")
    figure, (axis,) = new(height=4.0)
    palette = colours([record.class_name for run in runs for record in run.records])
    dense = len(scored) > MANY
    halo = [patheffects.withStroke(linewidth=4, foreground="white")]
    for name in sorted({record.class_name for record in scored}):
        mine = [record for record in scored if record.class_name == name]
        x, y, colour = _e2el(mine), np.array([record.score for record in mine], dtype=np.float64), palette[name]
        size, alpha = (4, 0.15) if dense else (9, 0.35)
        axis.scatter(x, y, size, colour, alpha=alpha, linewidths=0, rasterized=dense)
        bars: dict[str, Any] = {"color": colour, "path_effects": halo, "zorder": 3}
        axis.plot(np.percentile(x, (25, 75)), [y.mean()] * 2, **bars)
        axis.plot([x.mean()] * 2, np.percentile(y, (25, 75)), **bars)
        label = f"{name}: {y.mean():.3g} in {x.mean():,.0f} ms"
        axis.plot(x.mean(), y.mean(), "o", markersize=8, color=colour, markeredgecolor="white", label=label, zorder=4)
    milliseconds(axis, [*_e2el(scored)], "E2E latency (ms)", "x")
    axis.set_ylabel("score of the answer")
    axis.legend(loc="best")
    return _drawn(plot, svg(figure))


@in_style
def outcomes_over_time(runs: Sequence[Run]) -> Plot:
    """Outcomes and requests in flight over time."""
    plot = Plot(
        "outcomes-time",
        "Timeline of outcomes",
        "How requests ended, by the time of their end (above), and how many were in flight (below). Dotted lines "
        "divide the loads of a sweep.",
    )
    records = [record for run in runs for record in run.records]
    if not records:
        return _missing(plot, "nothing was sent")
    start = runs[0].start
    end = np.array([record.end - start for record in records])
    edges = np.linspace(0, max(end.max(), 1e-3) * 1.0001, 61)
    figure, axes = new(2, 1, share_x=True, height=4.2)
    floor = np.zeros(len(edges) - 1)
    width = edges[1] - edges[0]
    for outcome in Outcome:
        count, _ = np.histogram(end[[record.outcome is outcome for record in records]], edges)
        if count.any():
            colour, label = OUTCOME_COLOURS[outcome], f"{outcome.value} ({count.sum()})"
            axes[0].bar(edges[:-1], count / width, width, bottom=floor / width, align="edge", color=colour, label=label)
            floor += count
    axes[0].set_ylabel("requests/s")
    legend_above(axes[0], 3)
    steps = sorted([(r.sent - start, 1) for r in records] + [(r.end - start, -1) for r in records])
    axes[1].step([t for t, _ in steps], np.cumsum([step for _, step in steps]), where="post", color="#0072B2")
    axes[1].set_ylim(bottom=0)
    axes[1].set_ylabel("in flight")
    axes[1].set_xlabel("seconds since the start")
    for run in runs[1:]:
        for axis in axes:
            axis.axvline(run.start - start, color="#8a9099", linestyle=":", linewidth=1)
    return _drawn(plot, svg(figure))


@in_style
def where_it_went(runs: Sequence[Run]) -> Plot:
    """Tokens kept and discarded, and time by what it was spent on."""
    plot = Plot(
        "spend",
        "Where tokens and time went",
        "By class, from the answers' alignment objects: generated tokens that were kept and that were discarded; the "
        "server's time per answer while it generated, scored and waited (generation and scoring may overlap).",
    )
    told = [r for run in runs for r in _completed(run.records) if r.spend]
    if not told:
        return _missing(plot, "no answer carried an alignment object with its spend")
    names = sorted({record.class_name for record in told}, reverse=True)
    figure, axes = new(1, 2, height=max(1.8, 1.2 + 0.4 * len(names)))
    parts = (
        ("tokens per answer", (("accepted", "tokens_accepted"), ("discarded", "tokens_discarded"))),
        ("seconds per answer", (("generation", "generation_s"), ("scoring", "scoring_s"), ("waiting", "waiting_s"))),
    )
    for axis, (label, kinds) in zip(axes, parts, strict=True):
        left = np.zeros(len(names))
        for (kind, key), colour in zip(kinds, ("#009E73", "#E69F00", "#B4B9BF"), strict=False):
            mean = [np.mean([r.spend.get(key, 0.0) for r in told if r.class_name == name]) for name in names]
            axis.barh(names, mean, left=left, color=colour, label=kind, height=0.6)
            left += mean
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
        legend_above(axis, 3)
    axes[1].set_yticklabels([])
    return _drawn(plot, svg(figure))


def _completed(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.outcome is Outcome.COMPLETED]


def _e2el(records: Sequence[Record]) -> Floats:
    return _ms([record.e2el for record in records])


def _ms(values: Sequence[float | None]) -> Floats:
    return 1000 * np.array(values, dtype=np.float64)


def _missing(plot: Plot, why: str) -> Plot:
    return Plot(plot.key, plot.title, plot.caption, missing=why)


def _drawn(plot: Plot, picture: str) -> Plot:
    return Plot(plot.key, plot.title, plot.caption, svg=picture)
