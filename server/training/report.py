"""What a head scored on held-out pairs, and the model card that says so, whichever way it falls.

Everything takes numpy arrays of float64 with one entry per pair, in one order; lengths are tokens of
the answer alone.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BINS = 10


def credit(margins: Array) -> Array:
    """1 where the chosen answer has the larger value, 0 where the rejected has, 0.5 for a tie. [n] -> [n]."""
    result: Array = (np.sign(margins) + 1) / 2
    return result


def estimate(values: Array) -> dict[str, float]:
    """Mean of [n] values and its standard error, s / sqrt(n) with the sample deviation s (nan for n = 1)."""
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return {"value": float(np.mean(values)), "se": error}


def calibration(margins: Array, bins: int = BINS) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error of sigmoid(|margin|), the probability given to the answer ranked higher.

    That confidence lies in [0.5, 1], which is cut into equal bins; the error is the mean over pairs of
    |accuracy - mean confidence| of their bin (Naeini et al. 2015). Returns it with the bins that are not empty.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    hit = credit(margins)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows, error = [], 0.0
    for number in range(bins):
        inside = index == number
        if not inside.any():
            continue
        row = {
            "from": 0.5 + number / (2 * bins),
            "to": 0.5 + (number + 1) / (2 * bins),
            "pairs": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(hit[inside].mean()),
        }
        rows.append(row)
        error += row["pairs"] / len(margins) * abs(row["accuracy"] - row["confidence"])
    return error, rows


def pearson(x: Array, y: Array) -> float:
    """Linear correlation of [n] and [n]; nan where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan


def ranks(values: Array) -> Array:
    """Ranks from 0 of [n] values; equal ones get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    result: Array = ((ends - counts + ends - 1) / 2)[inverse]
    return result


def spearman(x: Array, y: Array) -> float:
    """Rank correlation of [n] and [n]; nan where one of them is constant."""
    return pearson(ranks(x), ranks(y))


def evaluate(chosen: Array, rejected: Array, chosen_length: Array, rejected_length: Array) -> dict[str, Any]:
    """All figures of the held-out part from scores [n] and lengths [n] of both answers, ready for JSON."""
    margins = chosen - rejected
    longer_by = chosen_length - rejected_length
    hits, shorter, longer = credit(margins), credit(-longer_by), credit(longer_by)
    error, bins = calibration(margins)
    scores = np.concatenate([chosen, rejected])
    lengths = np.concatenate([chosen_length, rejected_length])
    return {
        "pairs": len(margins),
        "accuracy": estimate(hits),
        "shorter_wins": estimate(shorter),
        "longer_wins": estimate(longer),
        "minus_shorter_wins": estimate(hits - shorter),
        "minus_longer_wins": estimate(hits - longer),
        "log_loss": estimate(np.logaddexp(0, -margins)),
        "calibration_error": error,
        "calibration_bins": bins,
        "length": {
            "pearson": pearson(scores, lengths),
            "spearman": spearman(scores, lengths),
            "pearson_within_pairs": pearson(margins, longer_by),
            "spearman_within_pairs": spearman(margins, longer_by),
        },
    }


def reliability_plot(path: Path, held_out: dict[str, Any], title: str) -> None:
    """Draws accuracy against confidence with error bars of one standard error, as a small PNG (Agg, no display)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bins = held_out["calibration_bins"]
    confidence = [row["confidence"] for row in bins]
    accuracy = [row["accuracy"] for row in bins]
    errors = [math.sqrt(max(a * (1 - a), 0.0) / row["pairs"]) for a, row in zip(accuracy, bins, strict=True)]
    figure = Figure(figsize=(4.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, label="calibrated")
    axes.errorbar(confidence, accuracy, yerr=errors, marker="o", capsize=3, label="head (1 standard error)")
    for x, y, row in zip(confidence, accuracy, bins, strict=True):
        axes.annotate(str(row["pairs"]), (x, y), textcoords="offset points", xytext=(6, -10), fontsize=7)
    axes.set(xlim=(0.48, 1.02), ylim=(-0.02, 1.05), xlabel="probability given to the preferred answer")
    axes.set_ylabel("share of pairs where people preferred it")
    axes.set_title(f"{title}\nerror {held_out['calibration_error']:.3f}; numbers: pairs per bin", fontsize=9)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def verdict(held_out: dict[str, Any]) -> str:
    """Sentences that put the accuracy beside chance and the better of the two length rules, by standard errors."""
    accuracy = held_out["accuracy"]
    rule = max(("shorter_wins", "longer_wins"), key=lambda name: held_out[name]["value"])
    difference = held_out[f"minus_{rule}"]
    name = rule.replace("_", " ")
    return (
        f"{_against(accuracy['value'] - 0.5, accuracy['se'], 'chance')}\n"
        f"{_against(difference['value'], difference['se'], f'the rule “{name}”')}"
    )


def summary(held_out: dict[str, Any]) -> str:
    """How far to trust the head, in bold: weak below 65 % of pairs or where a rule about length is not beaten."""
    accuracy = held_out["accuracy"]["value"]
    rules = [held_out["minus_shorter_wins"], held_out["minus_longer_wins"]]
    beaten = all(rule["value"] >= 2 * rule["se"] for rule in rules)
    share = f"it ranks {100 * accuracy:.0f} of 100 held-out pairs as the labellers did, where a coin ranks 50"
    if accuracy < 0.65 or not beaten:
        also = "" if beaten else ", and it is not shown to beat a rule that looks at length alone"
        return f"**Weak: {share}{also}. It shows the plumbing; do not rely on it.**"
    return f"**On this data {share}. Other data, longer answers and answers chosen by this score were not tried.**"


def _against(difference: float, error: float, what: str) -> str:
    figures = f"({100 * difference:+.1f} ± {100 * error:.1f} points)"
    if not abs(difference) >= 2 * error:  # also for nan
        return f"It is not shown to differ from {what} {figures}."
    return f"It is {'better' if difference > 0 else 'worse'} than {what} by at least two standard errors {figures}."


def card(report: dict[str, Any], command: str) -> str:
    """The README of a head, from its report and the command that made it."""
    data, recipe, held = report["data"], report["recipe"], report["held_out"]

    def row(name: str, figure: dict[str, float]) -> str:
        return f"| {name} | {figure['value']:.3f} ± {figure['se']:.3f} |"

    left_out = ", ".join(f"{count} ({reason})" for reason, count in data["skipped"].items()) or "none"
    tuned = bool(report["fine_tuning"]) and report["fine_tuning"]["best_epoch"] > 0
    backbone = f"with its last {recipe['unfreeze']} layers fine-tuned" if tuned else "frozen"
    length = held["length"]
    lines = [
        f"# A reward head on {recipe['base']}",
        "",
        f"One linear score on the last hidden state of `{recipe['base']}` (backbone {backbone}),",
        "fitted to preference pairs as a Bradley-Terry model. It says which of two answers these labellers would more",
        "probably have preferred, and does that as well as the table says. Nothing is claimed from it about alignment,",
        "safety or helpfulness.",
        "",
        summary(held),
        "",
        "## What it scored",
        "",
        f"On {held['pairs']} held-out pairs, looked at once, after everything was chosen. Mean ± standard error.",
        "",
        "| accuracy on pairs | |",
        "|---|---|",
        row("this head", held["accuracy"]),
        row("rule: the shorter answer wins", held["shorter_wins"]),
        row("rule: the longer answer wins", held["longer_wins"]),
        row("head minus “shorter wins”, paired", held["minus_shorter_wins"]),
        row("head minus “longer wins”, paired", held["minus_longer_wins"]),
        "",
        verdict(held),
        "",
        f"- Log-loss {held['log_loss']['value']:.3f} ± {held['log_loss']['se']:.3f} nats per pair (0.693 is a coin).",
        f"- Expected calibration error {held['calibration_error']:.3f} ({BINS} bins; [plot](reliability.png)).",
        f"- Score against answer length in tokens: Pearson {length['pearson']:.2f}, Spearman {length['spearman']:.2f};",
        f"  differences within pairs: {length['pearson_within_pairs']:.2f} and {length['spearman_within_pairs']:.2f}.",
        f"- On its own training pairs: accuracy {report['train']['accuracy']['value']:.3f}.",
        "",
        "## Recipe",
        "",
        f"- Data: {data['name']}.",
        f"  Licence: {data['licence']}. File `{data['file']}`, {data['pairs']} pairs, SHA-256",
        f"  `{data['sha256']}`.",
        f"  Lines left out: {left_out}. These pairs cannot judge what this head has selected.",
        f"- Split by a hash of the conversation's opening, seed {recipe['seed']}: {data['train']} pairs to train,",
        f"  {data['held_out']} held out.",
        "- Features: float32, after the final norm, at the end-of-turn token; of prompt and answer the last",
        f"  {recipe['max_tokens']} tokens ({100 * data['cut_share']:.0f} % of sequences are cut).",
        f"- L2 penalty {recipe['l2']:.3g} on standardised features, of {len(report['cross_validation'])} values, by",
        f"  {recipe['folds']}-fold cross-validation inside the training part (its accuracy there: "
        f"{report['cross_validation_accuracy']:.3f}).",
        *_tuning(report),
        f"- Made on {report['created']} in {report['seconds']:.0f} s on CPU by:",
        "",
        "```console",
        f"$ {command}",
        "```",
        "",
        "All figures: [report.json](report.json). The weights are safetensors: loading them runs no code.",
        "",
    ]
    return "\n".join(lines)


def _tuning(report: dict[str, Any]) -> list[str]:
    tuning, recipe = report["fine_tuning"], report["recipe"]
    if tuning is None:
        return []
    losses = ", ".join(f"{loss:.4f}" for loss in tuning["validation_loss"])
    kept = f"epoch {tuning['best_epoch']} kept" if tuning["best_epoch"] else "no epoch was better, so it stays frozen"
    return [
        f"- Fine-tuning of the last {recipe['unfreeze']} layers (AdamW, {recipe['lr']:g}), validation loss by epoch:",
        f"  {losses}; {kept}.",
    ]
