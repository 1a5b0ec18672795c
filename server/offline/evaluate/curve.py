"""`guiderail evaluate curve`: the effect of best-of-N by one reward on another, for every N from one pool of samples.

M answers to each prompt are drawn from the served model and scored by a proxy (the reward that best-of-N would
choose by) and by gold (the reward that matters). The expected gold of the answer that best-of-N chooses is estimated
for each N up to M without bias, as the average over all subsets of N answers; beside it stands the selection's KL
from the served model, at most log N - (N - 1)/N (Beirami et al., arXiv 2401.01879). Where gold falls while the proxy
rises, the proxy is over-optimised (Gao et al., arXiv 2210.10760). Bands are bootstrap intervals over prompts. From
the same answers HedgeTune (guides/scoring/hedge.py) recommends a strength of selection: the N of best-of-n and the mu
of best_of_poisson with the largest expected gold. A prompt that a reward fails on is named and left out.

Answers and scores are kept in OUT.progress.jsonl until the report is written; after an interruption the same command
resumes from there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.offline.journal import Journal
from guiderail.server.offline.options import (
    REWARD_HELP,
    NamedReward,
    add_engine_arguments,
    add_prompt_arguments,
    describe_term,
    output_folder,
    parse_reward,
    report_on_prompts,
    terms_of,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from guiderail.guides.core.types import SamplingSpec
    from guiderail.server.offline.options import Prompts
    from guiderail.server.state import ServerState

    Array = npt.NDArray[np.float64]

RESAMPLES = 2000
HEDGE_RESAMPLES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("--proxy", required=True, metavar="REWARD", help=f"reward that best-of-N chooses by: {REWARD_HELP}")
    add("--gold", required=True, metavar="REWARD", help="reward that the chosen answers are judged by, given likewise")
    add("--ns", metavar="N,N,...", help="numbers of candidates (powers of two up to M)")
    add_prompt_arguments(parser, samples=128, picture="curve.png")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status. Raises GuiderailError."""
    from guiderail.server.offline.evaluate.curve_plot import draw_curve

    ns = _numbers(args)
    out = output_folder(args.out)
    rewards = [parse_reward(args.proxy, "proxy"), parse_reward(args.gold, "gold")]

    async def measure(
        state: "ServerState", prompts: "Prompts", sampling: "SamplingSpec", journal: Journal
    ) -> dict[str, Any]:
        return await evaluate_curve(state, prompts, rewards, args.samples, ns, sampling, journal)

    def write(folder: Path, report: dict[str, Any]) -> str:
        draw_curve(folder / "curve.png", report)
        return table(report)

    return report_on_prompts(args, out, rewards, ("proxy", "gold", "ns"), measure, write)


def _numbers(args: argparse.Namespace) -> list[int]:
    """The values of N. Raises GuiderailError if these or other numbers are out of range."""
    if args.samples < 2 or args.max_tokens < 1 or args.temperature <= 0 or (args.limit is not None and args.limit < 2):
        raise GuiderailError("-m and --limit must be at least 2, --max-tokens at least 1, --temperature positive")
    if args.ns is None:
        return [2**i for i in range(args.samples.bit_length())]
    try:
        ns = sorted({int(part) for part in args.ns.split(",")} | {1})
    except ValueError:
        raise GuiderailError(f"--ns {args.ns}: expected numbers separated by commas") from None
    if ns[0] < 1 or ns[-1] > args.samples:
        raise GuiderailError(f"--ns {args.ns}: each must lie between 1 and M, which is {args.samples}")
    return ns


async def evaluate_curve(
    state: "ServerState",
    prompts: "Prompts",
    rewards: Sequence[NamedReward],
    m: int,
    ns: Sequence[int],
    sampling: "SamplingSpec",
    journal: Journal | None = None,
) -> dict[str, Any]:
    """The metrics for report.json; `rewards` are proxy and gold. Raises the errors of drawing and scoring."""
    import numpy as np

    from guiderail.server.offline.evaluate.draw import draw, score_all

    terms, journal = terms_of(state, rewards), journal or Journal()
    pools = await draw(state, prompts, m, sampling, journal)
    whole, columns = await score_all(state, pools, terms, journal)
    proxy, gold = map(np.array, columns)  # [P, M] each
    seed = sampling.seed or 0
    return {
        "m": m,
        "proxy_reward": describe_term(terms[0]),
        "gold_reward": describe_term(terms[1]),
        "tokens_per_answer": float(
            np.mean([len(answer.token_ids) for index in whole for answer in pools[index].answers])
        ),
        **curve_metrics(proxy, gold, ns, seed),
        "hedge": hedges(proxy, gold, seed),
    }


def curve_metrics(proxy: "Array", gold: "Array", ns: Sequence[int], seed: int) -> dict[str, Any]:
    """Curves over N with 95 % bands, from the values [P, M] of both rewards for P prompts; ns ascending from 1."""
    import numpy as np

    from guiderail.guides.scoring.hedge import best_of_n_curve
    from guiderail.guides.scoring.kl import best_of_n_kl
    from guiderail.server.offline.evaluate.pair_metrics import spearman

    picks = np.random.default_rng(seed).integers(len(proxy), size=(RESAMPLES, len(proxy)))

    def band(values: "Array") -> dict[str, Any]:
        """Mean over prompts of [P, ...] with the 2.5 % and 97.5 % quantiles of its bootstrap."""
        drawn = values[picks].mean(axis=1)
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        return {"value": values.mean(axis=0).tolist(), "low": low.tolist(), "high": high.tolist()}

    def curves(of: "Array") -> "Array":
        return np.array([best_of_n_curve(p, g, ns) for p, g in zip(proxy, of, strict=True)])

    by_gold, by_proxy = curves(gold), curves(proxy)
    best = int(by_gold.mean(axis=0).argmax())
    correlations = np.array([spearman(p, g) for p, g in zip(proxy, gold, strict=True)])
    known = correlations[~np.isnan(correlations)]
    return {
        "ns": list(ns),
        "kl": [best_of_n_kl(n) for n in ns],
        "gold": band(by_gold),
        "gold_gain": band(by_gold - by_gold[:, :1]),  # over N = 1: differences between prompts cancel
        "proxy": band(by_proxy),
        "gold_best": {"n": ns[best], "largest_n_minus_best": band(by_gold[:, -1] - by_gold[:, best])},
        "spearman_within_prompts": {"mean": float(known.mean()) if len(known) else None, "prompts": len(known)},
    }


def hedges(proxy: "Array", gold: "Array", seed: int) -> dict[str, Any]:
    """HedgeTune's N and mu from values [P, M] of both rewards, with 95 % intervals by bootstrap over prompts.

    Gold is averaged over prompts at equal rank of the proxy within its prompt; N goes up to M.
    """
    import numpy as np

    from guiderail.guides.scoring.hedge import Family, by_proxy, hedge

    picks = np.random.default_rng(seed).integers(len(proxy), size=(HEDGE_RESAMPLES, len(proxy)))
    ranked = np.array([by_proxy(p, g) for p, g in zip(proxy, gold, strict=True)])
    ranks, m = np.arange(ranked.shape[1], dtype=np.float64), ranked.shape[1]
    found: dict[str, Any] = {}
    families: tuple[tuple[Family, str], ...] = (("best_of_n", "n"), ("best_of_poisson", "mu"))
    for family, name in families:
        best = hedge(ranks, ranked.mean(axis=0), family, float(m))
        drawn = [hedge(ranks, ranked[rows].mean(axis=0), family, float(m)).theta for rows in picks]
        low, high = np.quantile(drawn, (0.025, 0.975))
        found[family] = {
            name: best.theta, "low": float(low), "high": float(high), "gold": best.gold, "hacked": best.hacked
        }  # fmt: skip
    return found


def table(report: dict[str, Any]) -> str:
    """The curve as lines of text."""
    lines = [f"{'N':>6}{'KL <=':>8}{'proxy':>11}  {'95 % interval':22}{'gold':>9}  95 % interval"]
    proxy, gold = report["proxy"], report["gold"]
    for i, (n, kl) in enumerate(zip(report["ns"], report["kl"], strict=True)):
        part = [f"{each['value'][i]:.4f}  {each['low'][i]:.4f} to {each['high'][i]:.4f}" for each in (proxy, gold)]
        lines.append(f"{n:6}{kl:8.3f}   {part[0]:32}{part[1]}")
    best = report["gold_best"]
    change = best["largest_n_minus_best"]
    lines.append(
        f"gold is largest at N = {best['n']}; from there to N = {report['ns'][-1]} it changes by {change['value']:.4f} "
        f"({change['low']:.4f} to {change['high']:.4f}; the best N was picked on the same answers)"
    )
    for family, name, guide in (
        ("best_of_n", "n", '{{"guide": {{"name": "best_of_n", "n": {:.0f}}}}}'),
        ("best_of_poisson", "mu", '{{"select": {{"name": "best_of_poisson", "mu": {:.2f}}}}}'),
    ):
        found = report["hedge"][family]
        end = "beyond it gold falls" if found["hacked"] else "the limit of these answers: gold still rises"
        lines.append(
            f"HedgeTune: {guide.format(found[name])}, {name} = {found[name]:.2f} ({found['low']:.2f} to "
            f"{found['high']:.2f}), expected gold {found['gold']:.4f}; {end}"
        )
    return "\n".join(lines)
