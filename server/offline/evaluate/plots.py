"""Small PNG pictures by matplotlib (Agg, no display), and the parts that several of them share."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without anything that differs from run to run."""
    figure.savefig(path, dpi=90, metadata={"Software": None})


def draw_reliability(axes: Axes, bins: Sequence[dict[str, float]], label: str) -> None:
    """Accuracy against confidence from `calibration`'s bins, with one standard error and the pairs of each bin."""
    confidence = [row["confidence"] for row in bins]
    accuracy = [row["accuracy"] for row in bins]
    errors = [math.sqrt(max(a * (1 - a), 0.0) / row["pairs"]) for a, row in zip(accuracy, bins, strict=True)]
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, label="calibrated")
    axes.errorbar(confidence, accuracy, yerr=errors, marker="o", capsize=3, label=label)
    for x, y, row in zip(confidence, accuracy, bins, strict=True):
        axes.annotate(str(row["pairs"]), (x, y), textcoords="offset points", xytext=(6, -10), fontsize=7)
    axes.set(xlim=(0.48, 1.02), ylim=(-0.02, 1.05), xlabel="probability given to the preferred answer")
    axes.set_ylabel("share of pairs where people preferred it")
