"""The model card of a head: its results on held-out pairs, good or bad."""

from pathlib import Path
from typing import Any

from guiderail.server.offline.evaluate.pair_metrics import BINS
from guiderail.server.offline.evaluate.plots import draw_reliability, new_figure, save_figure


def reliability_plot(path: Path, held_out: dict[str, Any], title: str) -> None:
    """Draw accuracy against confidence with error bars of one standard error, as a small PNG."""
    figure = new_figure(4.5, 4.2)
    axes = figure.add_subplot()
    draw_reliability(axes, held_out["calibration_bins"], "head (1 standard error)")
    axes.set_title(f"{title}\nerror {held_out['calibration_error']:.3f}; numbers: pairs per bin", fontsize=9)
    axes.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)


def verdict(held_out: dict[str, Any]) -> str:
    """Sentences that compare the accuracy with chance and with the better length rule, by standard errors."""
    accuracy = held_out["accuracy"]
    rule = max(("shorter_wins", "longer_wins"), key=lambda name: held_out[name]["value"])
    difference = held_out[f"minus_{rule}"]
    name = rule.replace("_", " ")
    return (
        f"{_against(accuracy['value'] - 0.5, accuracy['se'], 'chance')}\n"
        f"{_against(difference['value'], difference['se'], f'the rule “{name}”')}"
    )


def summary(held_out: dict[str, Any]) -> str:
    """Sentence in bold on how far to trust the head: weak below 65 % of pairs, or if it does not beat a length rule."""
    accuracy = held_out["accuracy"]["value"]
    rules = [held_out["minus_shorter_wins"], held_out["minus_longer_wins"]]
    beaten = all(rule["value"] >= 2 * rule["se"] for rule in rules)
    share = f"it ranks {100 * accuracy:.0f} of 100 held-out pairs as the labellers did, where a coin ranks 50"
    if accuracy < 0.65 or not beaten:
        also = "" if beaten else ", and it is not shown to beat a rule that looks at length alone"
        return f"**Weak: {share}{also}. It shows the plumbing; do not rely on it.**"
    return f"**On this data {share}. Other data, longer answers and answers chosen by this score were not tried.**"


def _against(difference: float, error: float, what: str) -> str:
    points = f"({100 * difference:+.1f} ± {100 * error:.1f} points)"
    if not abs(difference) >= 2 * error:  # also for nan
        return f"It is not shown to differ from {what} {points}."
    return f"It is {'better' if difference > 0 else 'worse'} than {what} by at least two standard errors {points}."


def card(report: dict[str, Any], command: str) -> str:
    """The README of a head, from its report and the command that made it."""
    data, recipe, held = report["data"], report["recipe"], report["held_out"]

    def row(name: str, metric: dict[str, float]) -> str:
        return f"| {name} | {metric['value']:.3f} ± {metric['se']:.3f} |"

    left_out = ", ".join(f"{count} ({reason})" for reason, count in data["skipped"].items()) or "none"
    tuned = bool(report["fine_tuning"]) and report["fine_tuning"]["best_epoch"] > 0
    backbone = f"with its last {recipe['unfreeze']} layers fine-tuned" if tuned else "frozen"
    length = held["length"]
    seconds = "" if report["seconds"] is None else f"in {report['seconds']:.0f} s "  # None: it was interrupted
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
        "  A longer conversation is cut when it is served, on the left as here.",
        f"- L2 penalty {recipe['l2']:.3g} on standardised features, of {len(report['cross_validation'])} values, by",
        f"  {recipe['folds']}-fold cross-validation inside the training part (its accuracy there: "
        f"{report['cross_validation_accuracy']:.3f}).",
        *_tuning(report),
        f"- Made on {report['created']} {seconds}on CPU by:",
        "",
        "```console",
        f"$ {command}",
        "```",
        "",
        "All metrics: [report.json](report.json). The weights are safetensors: loading them runs no code.",
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
