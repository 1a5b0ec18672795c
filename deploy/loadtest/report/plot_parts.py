"""Parts shared by the plots of a report: colours, axes, and figures as self-contained SVG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, whose colours stay distinct for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5b5b5b", "#8c6d31")
OUTCOME_COLOURS = {
    "completed": "#009E73",
    "rejected_429": "#E69F00",
    "http_error": "#D55E00",
    "connection_error": "#7F2B0A",
    "stream_error": "#CC79A7",
    "timeout": "#4B2E83",
    "cancelled": "#B4B9BF",
}
RANKS = ((50, "p50", COLOURS[0]), (90, "p90", COLOURS[4]), (99, "p99", COLOURS[1]))
MANY = 3000  # points beyond which a scatter is embedded as a picture: as SVG it would be megabytes
STYLE: Any = {
    "axes.labelcolor": "#3d4650",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "axes.edgecolor": "#8a9099",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture with its title and a sentence on how to read it. Without a picture, `missing` says why."""

    key: str
    title: str
    caption: str
    svg: str = ""
    missing: str = ""


# A decorator for functions that draw: matplotlib applies defaults when an artist is made, not when it is saved.
in_style = mpl.rc_context(STYLE)


def new(rows: int = 1, columns: int = 1, *, share_x: bool = False, height: float = 3.5) -> tuple[Figure, list[Axes]]:
    """An empty figure, 6.5 inches wide, and its axes in reading order."""
    figure = Figure(figsize=(6.5, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, sharex=share_x, squeeze=False).ravel())


def svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    out = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=no_metadata, transparent=True, dpi=160)
    text = out.getvalue()
    return text[text.index("<svg") :]


def milliseconds(axes: Axes, values: Sequence[float], label: str, which: Literal["x", "y"] = "y") -> None:
    """Make an axis show milliseconds, on a logarithmic scale where the values span more than a factor of 20."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 20 * min(positive):
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_minor_formatter(NullFormatter())
    elif which == "y":
        axes.set_ylim(bottom=0)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_label_text(label)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name; the same names get the same colours."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(sorted(set(names)))}


def legend_above(axis: Axes, columns: int) -> None:
    """Put the legend over the plot, where it hides nothing."""
    axis.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1.4)
