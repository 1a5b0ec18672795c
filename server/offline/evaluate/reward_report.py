"""The report of rewards on preference pairs: metrics of one reward, a table, and the pictures.

The pictures are drawn from the report alone.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from guiderail.server.offline.evaluate import pair_metrics as pf
from guiderail.server.offline.evaluate.pair_metrics import Array
from guiderail.server.offline.evaluate.plots import draw_reliability, new_figure, save_figure

HISTOGRAM_BINS = 30
LENGTH_BINS = 5


def reward_metrics(values: Array, lengths: Array) -> dict[str, Any]:
    """All metrics of one reward from its values [n, 2] of chosen and rejected answers and their lengths [n, 2]."""
    margins, longer_by = values[:, 0] - values[:, 1], lengths[:, 0] - lengths[:, 1]
    scale, rescaled = pf.temperature(margins), None
    if scale is not None:
        error, bins = pf.calibration(margins / scale)
        rescaled = {"temperature": scale, "calibration_error": error, "calibration_bins": bins}
    edges = np.histogram_bin_edges(values, HISTOGRAM_BINS)
    return {
        **pf.evaluate(values[:, 0], values[:, 1], lengths[:, 0], lengths[:, 1]),
        "accuracy_95": pf.wilson(pf.credit(margins)),
        "ties": int((margins == 0).sum()),
        "rescaled": rescaled,
        "by_length": pf.by_length(margins, longer_by),
        "by_length_difference": _by_difference(margins, longer_by),
        "distribution": {
            "chosen": pf.distribution(values[:, 0]),
            "rejected": pf.distribution(values[:, 1]),
            "difference": pf.distribution(margins),
        },
        "histogram": {
            "edges": edges.tolist(),
            "chosen": np.histogram(values[:, 0], edges)[0].tolist(),
            "rejected": np.histogram(values[:, 1], edges)[0].tolist(),
        },
    }


def _by_difference(margins: Array, longer_by: Array) -> list[dict[str, float]]:
    """Accuracy in groups of about equal size by how much longer the chosen answer is."""
    edges = np.unique(np.quantile(longer_by, np.linspace(0, 1, LENGTH_BINS + 1)))
    index = np.clip(np.searchsorted(edges, longer_by, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for number in np.unique(index):
        inside = index == number
        bounds = {"mean": float(longer_by[inside].mean()), "from": float(longer_by[inside].min())}
        rows.append({**bounds, "to": float(longer_by[inside].max()), **pf.wilson(pf.credit(margins[inside]))})
    return rows


def table(report: dict[str, Any]) -> str:
    """The report's main metrics as lines of text."""
    lines = [f"{'':24}{'accuracy':>8}  {'95 % interval':15}{'ties':>6}{'ECE':>7}{'rescaled':>10}{'r(length)':>11}"]

    def row(name: str, share: dict[str, float], rest: str = "") -> str:
        return f"{name:24}{share['value']:8.3f}  {share['low']:.3f} to {share['high']:.3f}  {rest}".rstrip()

    for label, metrics in report["rewards"].items():
        rescaled = metrics["rescaled"]
        error = f"{rescaled['calibration_error']:10.3f}" if rescaled else f"{'-':>10}"
        correlation = metrics["length"]["pearson_within_pairs"]
        rest = f"{metrics['ties']:6}{metrics['calibration_error']:7.3f}{error}{correlation:11.2f}"
        lines.append(row(label, metrics["accuracy_95"], rest))
    lines += [row(name.replace("_", " "), report[name]) for name in ("shorter_wins", "longer_wins")]
    return "\n".join([
        *lines,
        f"{report['pairs']['pairs']} pairs; ties count half. ECE: of sigmoid(difference), unscaled; rescaled: after",
        "division by the temperature that fits these same pairs best (-: there is none). r(length): of the",
        "differences of reward and of length within pairs.",
    ])  # fmt: skip


def draw_report(out: Path, report: dict[str, Any]) -> None:
    """Draw accuracy.png and one picture for each reward into the folder."""
    _draw_accuracy(out / "accuracy.png", report)
    for number, (label, metrics) in enumerate(report["rewards"].items(), 1):
        _draw_reward(out / f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '_', label)}.png", label, metrics)


def _draw_accuracy(path: Path, report: dict[str, Any]) -> None:
    rows = {name.replace("_", " "): report[name] for name in ("longer_wins", "shorter_wins")}
    rows |= {label: metrics["accuracy_95"] for label, metrics in reversed(report["rewards"].items())}
    figure = new_figure(6.4, 1.3 + 0.35 * len(rows))
    axes = figure.add_subplot()
    for height, (name, share) in enumerate(rows.items()):
        ends = [[share["value"] - share["low"]], [share["high"] - share["value"]]]
        color = "0.5" if name.endswith(" wins") else "C0"
        axes.errorbar([share["value"]], [height], xerr=ends, marker="o", capsize=4, color=color, linestyle="none")
        axes.annotate(f"{share['value']:.3f}", (share["value"], height), xytext=(0, 6), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    axes.axvline(0.5, color="0.7", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(ylim=(-0.6, len(rows) - 0.3), xlabel="share of pairs ranked as labelled, with 95 % interval")
    axes.set_title(f"{report['pairs']['pairs']} pairs of {report['pairs']['file']}; dashed: a coin", fontsize=9)
    save_figure(figure, path)


def _draw_reward(path: Path, label: str, metrics: dict[str, Any]) -> None:
    figure = new_figure(9.6, 7.6)
    (raw, rescaled), (scores, length) = figure.subplots(2, 2)
    draw_reliability(raw, metrics["calibration_bins"], "sigmoid(difference)")
    raw.set_title(f"as it stands: calibration error {metrics['calibration_error']:.3f}", fontsize=9)
    raw.legend(loc="lower right", fontsize=8)
    fitted = metrics["rescaled"]
    if fitted is None:
        perfect = metrics["accuracy"]["value"] == 1
        text = "T → 0: every pair is ranked as labelled" if perfect else "T → ∞: it does not rank better than a coin"
        rescaled.set_axis_off()
        rescaled.text(0.5, 0.5, text, ha="center", transform=rescaled.transAxes)
    else:
        draw_reliability(rescaled, fitted["calibration_bins"], "sigmoid(difference / T)")
        error = fitted["calibration_error"]
        rescaled.set_title(f"T = {fitted['temperature']:.3g}, fitted on these pairs: error {error:.3f}", fontsize=9)
        rescaled.legend(loc="lower right", fontsize=8)

    edges = metrics["histogram"]["edges"]
    for side in ("chosen", "rejected"):
        scores.stairs(metrics["histogram"][side], edges, fill=True, alpha=0.45, label=side)
    scores.set(xlabel="raw reward", ylabel="answers")
    scores.set_title("distribution of the values", fontsize=9)
    scores.legend(fontsize=8)

    groups = metrics["by_length_difference"]
    share = [row["value"] for row in groups]
    ends = [[row["value"] - row["low"] for row in groups], [row["high"] - row["value"] for row in groups]]
    length.errorbar([row["mean"] for row in groups], share, yerr=ends, marker="o", capsize=3)
    length.axhline(0.5, color="0.7", linewidth=1, linestyle="--")
    length.set(ylim=(-0.02, 1.05), xlabel="tokens by which the chosen answer is longer")
    length.set_ylabel("share ranked as labelled")
    correlation = metrics["length"]["pearson_within_pairs"]
    length.set_title(f"fifths of the pairs: flat without length bias; r = {correlation:.2f}", fontsize=9)
    accuracy = metrics["accuracy_95"]
    figure.suptitle(f"{label}: accuracy {accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f})")
    save_figure(figure, path)
