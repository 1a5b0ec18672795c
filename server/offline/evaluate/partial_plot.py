"""The picture of `guiderail evaluate partial-correlation`: rank correlation and survival against checkpoints."""

from pathlib import Path
from typing import Any

from guiderail.server.offline.evaluate.plots import new_figure, save_figure


def draw_partial(path: Path, report: dict[str, Any]) -> None:
    """Draw the metrics of a report as a PNG."""
    figure = new_figure(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    rows = report["checkpoints"]
    tokens = [row["tokens"] for row in rows]
    for axes, name in ((left, "tau"), (right, "winner_survives")):
        value, low, high = ([row[name][key] for row in rows] for key in ("value", "low", "high"))
        axes.plot(tokens, value, marker="o", markersize=4, color="C0")
        axes.fill_between(tokens, low, high, alpha=0.2, color="C0", linewidth=0)
        axes.set_xticks(tokens)
        axes.set_xlabel(f"tokens of the partial answer (of {report['sampling']['max_tokens']} at most)")
        axes.grid(alpha=0.25)
    left.plot(tokens, [row["ended"] for row in rows], color="0.6", linestyle=":", label="share of answers ended")
    left.axhline(0, color="0.6", linewidth=1)
    left.set_title(f"partial against final reward ({report['reward']['name']})", fontsize=9)
    left.set_ylabel("Kendall's tau-b, mean over prompts")
    left.set_ylim(top=1.02)
    left.legend(fontsize=8)
    alpha = report["alpha"]
    right.axhline(1 - alpha, color="0.6", linewidth=1, linestyle="--", label="rejecting at random")
    right.set_title(f"the best answer survives rejecting {alpha:g} of {report['m']}", fontsize=9)
    right.set_ylabel("share of prompts")
    right.set_ylim(-0.02, 1.02)
    right.legend(fontsize=8, loc="lower right")
    prompts = report["prompts"]
    figure.suptitle(
        f"{report['model']}, {prompts['prompts']} prompts of {prompts['file']}, {report['m']} answers each; "
        "bands: 95 % over prompts", fontsize=10,
    )  # fmt: skip
    save_figure(figure, path)
