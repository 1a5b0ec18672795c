"""Metrics, table and picture of bench_quality.py, from the answers and their scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from measured import interval
from quality_tasks import Task


def diversity(text: str) -> float:
    """Product over n = 2, 3, 4 of unique n-grams / (n-grams + 1), of words: ARGS' (arXiv 2402.01694) 1 - rep_n."""
    words, product = text.split(), 1.0
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        product *= len(set(grams)) / (len(grams) + 1)
    return product


def worst_tenth(rows: np.ndarray) -> np.ndarray:
    """Mean of the smallest tenth (at least one) along the last axis."""
    return np.sort(rows, axis=-1)[..., : max(1, rows.shape[-1] // 10)].mean(axis=-1)


def metrics(task: Task, answers: Sequence[dict[str, Any]], even: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Metrics of one method on one task; `even` holds the answers of best-of-n at the same budget, to compare by prompt."""
    steered, judged = ([answer[key] for answer in answers] for key in ("steered", "judge"))
    found = {
        "steered": interval(steered),
        "worst_tenth": interval(steered, worst_tenth),
        "judge": interval(judged),
        "kl": float(np.mean([answer["kl"] for answer in answers])) if answers[0]["kl"] is not None else None,
        "diversity": float(np.mean([diversity(answer["text"]) for answer in answers])),
        "words": float(np.mean([len(answer["text"].split()) for answer in answers])),
        "tokens": float(np.mean([answer["generated"] for answer in answers])),
    }
    if task.extra is not None:
        found["extra"] = interval([task.extra[1](answer["steered"], answer["text"]) for answer in answers])
    if even is not None:
        found["over_even"] = interval([a["steered"] - b["steered"] for a, b in zip(answers, even, strict=True)])
    return found


def table(task: Task, results: dict[str, dict[str, Any]], even: str) -> list[str]:
    """The page's lines on one task."""
    extra = f" {task.extra[0]} |" if task.extra else ""
    lines = [
        f"**{task.title}**: {len(task.prompts)} prompts, at most {task.tokens} tokens; steered by {task.steered}; judged by "
        f"{task.judge}.",
        "",
        f"| method | steered reward | worst tenth | less {even} | judge |{extra} KL <=, nats | distinct | words "
        "| tokens generated | s |",
        "|---|---|---|---|---|" + ("---|" if extra else "") + "---|---|---|---|---|",
    ]
    for name, row in results.items():
        cells = [name, _cell(row["steered"]), _cell(row["worst_tenth"])]
        cells.append(_cell(row["over_even"], sign="+") if name != even else "")
        cells.append(_cell(row["judge"]))
        if extra:
            cells.append(_cell(row["extra"], digits=2))
        cells.append("-" if row["kl"] is None else f"{row['kl']:.2f}")
        cells += [f"{row['diversity']:.2f}", f"{row['words']:.1f}", f"{row['tokens']:.0f}", f"{row['seconds']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(value: Sequence[float], sign: str = "", digits: int = 3) -> str:
    middle, low, high = (f"{each:{sign}.{digits}f}" for each in value)
    return f"{middle} ({low} to {high})"


def picture(path: Path, tasks: Sequence[Task], results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Draw steered reward and judge of every method with intervals, one column per task."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    names = list(results[tasks[0].key])
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(4.2 * len(tasks) + 1.5, 1.6 + 0.62 * len(names)), layout="constrained", squeeze=False
    )
    for column, task in enumerate(tasks):
        for row, key in enumerate(("steered", "judge")):
            panel = axes[row][column]
            for y, name in enumerate(names):
                middle, low, high = results[task.key][name][key]
                color = "0.4" if name.startswith("plain") else "C0" if name.startswith("best of") else "C1"
                panel.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", capsize=2, color=color)
            panel.axvline(results[task.key]["plain"][key][0], color="0.6", linewidth=1, linestyle="--")
            panel.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
            panel.invert_yaxis()
            panel.grid(alpha=0.25, axis="x")
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.set_xlabel(task.steered if key == "steered" else task.judge, fontsize=8)
            panel.set_title(f"{task.title}: {'the reward steered by' if key == 'steered' else 'the judge'}", fontsize=9)
    figure.suptitle(
        "Means over prompts with 95 % intervals; grey: not steered, blue: best-of-n, orange: other guides; dashed: plain",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)
