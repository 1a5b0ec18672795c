"""`guiderail evaluate curve`: what best-of-N by one reward does to another, for every N from one pool of samples.

M answers to each prompt are drawn from the served model and scored by a proxy (which best-of-N would choose by)
and by gold (which one cares about). The expected gold of the answer that best-of-N chooses is estimated for each
N up to M without bias, by the average over all subsets of N answers; beside it stands the selection's KL from the
served model, at most log N - (N - 1)/N (Beirami et al., arXiv 2401.01879). Where gold falls while proxy rises, the
proxy is over-optimised (Gao et al., arXiv 2210.10760). Bands are bootstrap intervals over prompts. From the same
answers HedgeTune (guides/scoring/hedge.py) recommends how hard to select: the N of best-of-n and the mu of
best_of_poisson that give the largest expected gold. A prompt that a reward fails on is named and left out.

Answers and scores are kept in OUT.progress.jsonl until the report is written; after an interruption the same command
goes on there.
"""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.offline.journal import Journal, whole_folder
from guiderail.server.offline.options import (
    REWARD_HELP,
    NamedReward,
    add_engine_arguments,
    describe_prompts,
    describe_term,
    journal_of,
    output_folder,
    parse_reward,
    pin_weights,
    settings_for,
    terms_of,
    write_report,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from guiderail.guides.core.types import Message, SamplingSpec
    from guiderail.server.state import ServerState

    Array = npt.NDArray[np.float64]

RESAMPLES = 2000
HEDGE_RESAMPLES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE", help='.jsonl or .jsonl.gz of {"messages": [...]} or {"prompt": ""}')
    add("--proxy", required=True, metavar="REWARD", help=f"what best-of-N chooses by: {REWARD_HELP}")
    add("--gold", required=True, metavar="REWARD", help="what is looked at, given likewise")
    add("-m", "--samples", type=int, default=128, metavar="M", help="answers drawn for each prompt (128)")
    add("--ns", metavar="N,N,...", help="numbers of candidates (powers of two up to M)")
    add("--max-tokens", type=int, default=64, help="tokens of an answer at most (64)")
    add("--temperature", type=float, default=1.0, help="sampling temperature (1)")
    add("--seed", type=int, default=0, help="seed of the answers and of the bootstrap (0)")
    add("--limit", type=int, metavar="N", help="use the first N prompts alone")
    add("--out", required=True, metavar="FOLDER", help="folder for report.json and curve.png, new or empty")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status. Raises GuiderailError."""
    from guiderail.guides.core.types import SamplingSpec
    from guiderail.server.offline.evaluate.curve_plot import draw_curve
    from guiderail.server.offline.offline_state import run_offline
    from guiderail.server.offline.prompt_file import read_prompts

    ns = _numbers(args)
    out = output_folder(args.out)
    rewards = [parse_reward(args.proxy, "proxy"), parse_reward(args.gold, "gold")]
    settings = settings_for(args, rewards)
    file = read_prompts(Path(args.prompts))
    prompts = file.prompts[: args.limit]
    if len(prompts) < 2:
        raise GuiderailError(f"--prompts {args.prompts}: at least 2 prompts are needed for an interval")
    sampling = SamplingSpec(args.max_tokens, args.temperature, seed=args.seed)

    kept = ("proxy", "gold", "samples", "ns", "max_tokens", "temperature", "seed", "limit")
    with journal_of(out, settings, ours=kept, args=args, data=file.sha256) as journal:

        async def main(state: "ServerState") -> int:
            pin_weights(journal, state)
            figures = await evaluate_curve(state, prompts, rewards, args.samples, ns, sampling, journal)
            report = {
                "created": datetime.now(UTC).date().isoformat(),
                "model": settings.model_name,
                "prompts": describe_prompts(args, file, len(prompts), journal),
                "sampling": {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed},
                **figures,
                "failed": journal.failed,
            }
            with whole_folder(out) as folder:
                write_report(folder, report)
                draw_curve(folder / "curve.png", report)
            journal.finish()
            print(table(report))
            print(out)
            return 0

        return run_offline(settings, main)


def _numbers(args: argparse.Namespace) -> list[int]:
    """The values of N. Raises GuiderailError for these and other numbers that make no sense."""
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
    prompts: "Sequence[tuple[Message, ...]]",
    rewards: Sequence[NamedReward],
    m: int,
    ns: Sequence[int],
    sampling: "SamplingSpec",
    journal: Journal | None = None,
) -> dict[str, Any]:
    """The figures for report.json; `rewards` are proxy and gold. Raises what drawing and scoring raise."""
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
        **curve_figures(proxy, gold, ns, seed),
        "hedge": hedges(proxy, gold, seed),
    }


def curve_figures(proxy: "Array", gold: "Array", ns: Sequence[int], seed: int) -> dict[str, Any]:
    """Curves over N with 95 % bands, from the values [P, M] of both rewards for P prompts; ns ascending from 1."""
    import numpy as np

    from guiderail.guides.scoring.diagnostics import best_of_n_curve, best_of_n_kl
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
        "gold_gain": band(by_gold - by_gold[:, :1]),  # over N = 1: without what differs between prompts
        "proxy": band(by_proxy),
        "gold_best": {"n": ns[best], "largest_n_minus_best": band(by_gold[:, -1] - by_gold[:, best])},
        "spearman_within_prompts": {"mean": float(known.mean()) if len(known) else None, "prompts": len(known)},
    }


def hedges(proxy: "Array", gold: "Array", seed: int) -> dict[str, Any]:
    """HedgeTune's N and mu from values [P, M] of both rewards, with 95 % intervals by bootstrap over prompts.

    Gold is averaged over prompts at equal rank of the proxy within its prompt; N goes up to M.
    """
    import numpy as np

    from guiderail.guides.scoring.diagnostics import by_proxy
    from guiderail.guides.scoring.hedge import Law, hedge

    picks = np.random.default_rng(seed).integers(len(proxy), size=(HEDGE_RESAMPLES, len(proxy)))
    ranked = np.array([by_proxy(p, g) for p, g in zip(proxy, gold, strict=True)])
    ranks, m = np.arange(ranked.shape[1], dtype=np.float64), ranked.shape[1]
    found: dict[str, Any] = {}
    laws: tuple[tuple[Law, str], ...] = (("best_of_n", "n"), ("best_of_poisson", "mu"))
    for law, name in laws:
        best = hedge(ranks, ranked.mean(axis=0), law, float(m))
        drawn = [hedge(ranks, ranked[rows].mean(axis=0), law, float(m)).theta for rows in picks]
        low, high = np.quantile(drawn, (0.025, 0.975))
        found[law] = {
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
    for law, name, guide in (
        ("best_of_n", "n", '{{"guide": {{"name": "best_of_n", "n": {:.0f}}}}}'),
        ("best_of_poisson", "mu", '{{"select": {{"name": "best_of_poisson", "mu": {:.2f}}}}}'),
    ):
        found = report["hedge"][law]
        end = "beyond it gold falls" if found["hacked"] else "the most that these answers can tell of: gold still rises"
        lines.append(
            f"HedgeTune: {guide.format(found[name])}, {name} = {found[name]:.2f} ({found['low']:.2f} to "
            f"{found['high']:.2f}), expected gold {found['gold']:.4f}; {end}"
        )
    return "\n".join(lines)
