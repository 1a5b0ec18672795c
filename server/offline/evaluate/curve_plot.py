"""The picture of `guiderail evaluate curve`: gold and proxy against N and against KL, with their bands."""

from pathlib import Path
from typing import Any

from guiderail.server.offline.evaluate.plots import new_figure, save_figure


def draw_curve(path: Path, report: dict[str, Any]) -> None:
    """Draw the curves of a report as a PNG."""
    figure = new_figure(9.6, 6.8)
    rows = figure.subplots(2, 2, sharex="col", sharey="row")
    ns, kl = report["ns"], report["kl"]
    for axes_of_row, name, color in zip(rows, ("gold", "proxy"), ("C1", "C0"), strict=True):
        curve = report[name]
        for axes, x in zip(axes_of_row, (ns, kl), strict=True):
            axes.plot(x, curve["value"], marker="o", markersize=4, color=color)
            axes.fill_between(x, curve["low"], curve["high"], alpha=0.2, color=color, linewidth=0)
            axes.grid(alpha=0.25)
        axes_of_row[0].set_ylabel(f"{name}: {report[f'{name}_reward']['name']}, of the chosen answer")
    best = report["gold_best"]["n"]
    for axes, x in zip(rows[0], (best, kl[ns.index(best)]), strict=True):
        axes.axvline(x, color="0.6", linewidth=1, linestyle="--")
    rows[0][0].set_title(f"dashed: gold is largest, N = {best}", fontsize=9)
    rows[0][0].set_xscale("log", base=2)
    rows[1][0].set(xlabel="N, candidates of best-of-N by the proxy")
    rows[1][0].set_xticks(ns, [str(n) for n in ns])
    rows[1][0].minorticks_off()
    rows[1][1].set(xlabel="KL from the served model in nats, at most log N - (N - 1)/N")
    prompts = report["prompts"]
    figure.suptitle(
        f"{report['model']}, {prompts['prompts']} prompts of {prompts['file']}, {report['m']} answers each; "
        "bands: 95 % over prompts", fontsize=10,
    )  # fmt: skip
    save_figure(figure, path)
