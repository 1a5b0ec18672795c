"""Combinations that lift the worst-served reward: the raw weighted sum against calibrated and log-sigmoid ones.

For each prompt three disjoint pools are drawn from the served model: candidates, a calibration pool, and a pool to
judge by. Each rule picks one candidate by three rewards that pull in different directions. The pick is judged by the
quantile of its raw reward in the third pool: 0.5 is a plain answer of the model, on any reward's scale.
The worst-served reward of a rule is the one with the smallest mean quantile over prompts.

    make bench-transforms            (about 10 minutes on 2 cores)
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from guiderail.guides.core.types import SamplingSpec
from guiderail.guides.scoring import COMBINES, parse_chain
from guiderail.server.offline.evaluate.draw import draw, score_all
from guiderail.server.offline.offline_state import offline
from guiderail.server.offline.prompt_file import read_prompts
from guiderail.server.requests.specs import read_name, read_rewards
from guiderail.server.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from report import ROOT, write_section

PROMPTS = ROOT / "deploy" / "prompts" / "everyday.jsonl"
HEAD = "hh-harmless-smollm2-135m"
REWARDS: list[dict[str, Any]] = [
    {"name": "sentiment"},
    {"name": "length", "label": "brevity", "target": 15},
    {"name": "harmless"},
]
LABELS = [str(r.get("label", r["name"])) for r in REWARDS]
RULES: dict[str, tuple[str, Any, str]] = {  # name: (transform, combination, description)
    "raw sum": ("identity", "sum", "weighted sum of raw rewards"),
    "standardized sum": ("standardize", "sum", "sum of rewards in standard deviations"),
    "calibrated sum": ("calibrated", "sum", "sum of quantiles (InfAlign's calibration)"),
    "log-sigmoid, q .85": ("log_sigmoid", "and", "sum of log-sigmoids, reference at the 0.85 quantile (LSC)"),
    "calibrated log": ("log", "sum", "sum of log quantiles"),
    "calibrated min": ("calibrated", "pointwise_min", "the smallest quantile"),
    "calibrated maxmin": ("calibrated", {"name": "maxmin", "beta": 0.1}, "MaxMin-RLHF's dual over quantiles"),
}
RESAMPLES = 4000


async def pools(args: argparse.Namespace) -> tuple[list[Any], np.ndarray]:
    """The answers' raw rewards [prompts, answers, rewards], of candidates, calibration and judging pool together."""
    prompts = read_prompts(PROMPTS).prompts[: args.limit]
    settings = Settings(reward={"harmless": {"path": HEAD}}, rewards=["sentiment", "length"], guides=["sampling"])
    async with offline(settings) as state:
        terms, _ = state.resolver.pipeline(read_rewards(REWARDS, "rewards"), read_name("sum", "combine"), args.n)
        total = args.n + args.calibration + args.judging
        drawn = await draw(state, prompts, total, SamplingSpec(args.max_tokens, 1.0, seed=args.seed))
        whole, values = await score_all(state, drawn, terms)
    return [drawn[index] for index in whole], np.array(values).transpose(1, 2, 0)


def choose(rule: str, candidates: np.ndarray, calibration: np.ndarray) -> int:
    """The rule's pick among candidates [N, R], with a calibration sample [K, R]."""
    transform, combination, _ = RULES[rule]
    chain = parse_chain(transform).resolved(len(candidates))
    values = np.stack([chain.fit(calibration[:, r], {})(candidates[:, r]) for r in range(candidates.shape[1])], axis=1)
    spec = {"name": combination} if isinstance(combination, str) else combination
    combine = COMBINES[spec["name"]].model_validate(spec)
    return int(np.argmax(combine.combine(values, np.ones(len(LABELS)), LABELS)))


def quantiles(picked: np.ndarray, judging: np.ndarray) -> np.ndarray:
    """Quantile [R] of the picked rewards [R] in the judging pool [M, R], ties counted half."""
    return ((judging < picked).mean(0) + (judging <= picked).mean(0)) / 2


def judge(values: np.ndarray, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """For each rule the quantiles [prompts, R] of its picks; "plain" is the first candidate."""
    found: dict[str, list[np.ndarray]] = {"plain sample": [], **{rule: [] for rule in RULES}}
    for table in values:
        candidates, rest = table[: args.n], table[args.n :]
        calibration, judging = rest[: args.calibration], rest[args.calibration :]
        found["plain sample"].append(quantiles(candidates[0], judging))
        for rule in RULES:
            found[rule].append(quantiles(candidates[choose(rule, candidates, calibration)], judging))
    return {rule: np.array(rows) for rule, rows in found.items()}


def summarise(found: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Means and 95 % bootstrap intervals over prompts, of each reward, of the worst-served, and against raw sum."""
    rng = np.random.default_rng(seed)
    some = next(iter(found.values()))
    draws = rng.integers(0, len(some), (RESAMPLES, len(some)))
    worst = {rule: rows[draws].mean(1).min(1) for rule, rows in found.items()}  # of each resample
    summary = {}
    for rule, rows in found.items():
        means = rows.mean(0)
        gain = worst[rule] - worst["raw sum"]
        summary[rule] = {
            "quantile": dict(zip(LABELS, means.tolist(), strict=True)),
            "interval": {
                label: np.percentile(rows[draws][:, :, i].mean(1), [2.5, 97.5]).tolist()
                for i, label in enumerate(LABELS)
            },
            "worst": {"reward": LABELS[int(means.argmin())], "value": float(means.min())},
            "worst_interval": np.percentile(worst[rule], [2.5, 97.5]).tolist(),
            "worst_gain_over_raw_sum": float(means.min() - found["raw sum"].mean(0).min()),
            "worst_gain_interval": np.percentile(gain, [2.5, 97.5]).tolist(),
        }
    return summary


def picture(path: Path, summary: dict[str, Any]) -> None:
    """Quantiles of each reward under each rule, with intervals; the worst-served one is marked."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9.6, 4.8), layout="constrained")
    for i, label in enumerate(LABELS):
        y = np.arange(len(summary)) + (i - 1) * 0.22
        x = np.array([each["quantile"][label] for each in summary.values()])
        spread = np.array([each["interval"][label] for each in summary.values()])
        axes.errorbar(x, y, xerr=np.abs(spread.T - x), fmt="o", capsize=2, markersize=5, label=label)
    for y, each in enumerate(summary.values()):
        axes.plot(each["worst"]["value"], y, marker="|", color="black", markersize=26, zorder=0, alpha=0.5)
    axes.set_yticks(range(len(summary)), list(summary))
    axes.invert_yaxis()
    axes.axvline(0.5, color="0.6", linewidth=1, linestyle="--")
    axes.set_xlabel(
        "mean quantile of the chosen answer in an unseen pool (0.5: a plain answer); bars: 95 % over prompts"
    )
    axes.set_title("Quantile by reward; the grey mark is a rule's worst-served reward", fontsize=10)
    axes.grid(alpha=0.25, axis="x")
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the comparison and write its section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=16, help="candidates (16)")
    parser.add_argument("--calibration", type=int, default=32, help="calibration answers (32)")
    parser.add_argument("--judging", type=int, default=48, help="answers of the judging pool (48)")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--limit", type=int, help="use only the first prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    drawn, values = asyncio.run(pools(args))
    summary = summarise(judge(values, args), args.seed)
    image = ROOT / "benchmarks" / "transforms.png"
    image.parent.mkdir(exist_ok=True)
    picture(image, summary)
    lines = [
        f"{len(drawn)} prompts (deploy/prompts/everyday.jsonl), best of {args.n} x {args.max_tokens} tokens by three "
        "rewards of weight 1: sentiment (VADER), brevity (closeness to 15 words) and the bundled harmless head "
        "(HH-RLHF pairs; weak, see its card). Mean quantile of the chosen answer in an unseen pool of "
        f"{args.judging} answers; 95 % intervals over prompts. The rewards are scorers, not judgements of people.",
        "",
        "| rule | " + " | ".join(LABELS) + " | worst-served | its gain over raw sum |",
        "|---|" + "---|" * (len(LABELS) + 2),
    ]
    for rule, each in summary.items():
        cells = [f"{each['quantile'][label]:.3f}" for label in LABELS]
        low, high = each["worst_interval"]
        gain_low, gain_high = each["worst_gain_interval"]
        gain = (
            "" if rule == "raw sum" else f"{each['worst_gain_over_raw_sum']:+.3f} ({gain_low:+.3f} to {gain_high:+.3f})"
        )
        lines.append(
            f"| {rule} | {' | '.join(cells)} | {each['worst']['reward']} {each['worst']['value']:.3f} "
            f"({low:.3f}-{high:.3f}) | {gain} |"
        )
    lines += ["", *(f"- {rule}: {text}." for rule, (_, _, text) in RULES.items()), "", "![](benchmarks/transforms.png)"]
    settings = dict(vars(args))
    write_section(
        "transforms",
        "Combining conflicting rewards",
        "make bench-transforms",
        lines,
        {"settings": settings, "rules": summary},
    )


if __name__ == "__main__":
    main()
