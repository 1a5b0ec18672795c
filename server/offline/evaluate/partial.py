"""`guiderail evaluate partial-correlation`: do rewards of partial answers predict which answers will be the best?

Speculative rejection (Sun et al., arXiv 2410.20290) depends on it: it rejects answers by their rewards so far.
M answers to each prompt are drawn from the served model; each is scored whole, and also cut after its first c
tokens, for each checkpoint c. Reported are Kendall's tau-b between partial and final rewards within prompts, the share
of prompts whose best answer survives the rejection of the lower alpha-quantile at c, and the shares of best-of-M's
reward and tokens that rejecting at all checkpoints in turn would keep. Intervals are bootstraps over prompts. A prompt
that the reward fails on is named and left out.

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
    from guiderail.guides.core.types import Answer, SamplingSpec
    from guiderail.server.offline.evaluate.draw import AnswerPool
    from guiderail.server.offline.options import Prompts
    from guiderail.server.state import ServerState

SEGMENTS = 4  # of an answer, between the default checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    # Its name in the namespace must not be that of the setting `reward`, which the command line would read.
    add("--reward", dest="scored", required=True, metavar="REWARD", help=REWARD_HELP)
    add("--checkpoints", metavar="C,C,...", help="numbers of tokens (quarters of --max-tokens)")
    add("--alpha", type=float, default=0.5, help="share of the answers that a checkpoint rejects (0.5)")
    add_prompt_arguments(parser, samples=32, picture="partial.png")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status. Raises GuiderailError."""
    from guiderail.server.offline.evaluate.partial_plot import draw_partial

    checkpoints = _checkpoints(args)
    out = output_folder(args.out)
    reward = parse_reward(args.scored)

    async def measure(
        state: "ServerState", prompts: "Prompts", sampling: "SamplingSpec", journal: Journal
    ) -> dict[str, Any]:
        m, alpha = args.samples, args.alpha
        return await evaluate_partial(state, prompts, reward, m, checkpoints, alpha, sampling, journal)

    def write(folder: Path, report: dict[str, Any]) -> str:
        draw_partial(folder / "partial.png", report)
        return table(report)

    return report_on_prompts(args, out, [reward], ("scored", "checkpoints", "alpha"), measure, write)


def _checkpoints(args: argparse.Namespace) -> list[int]:
    """The checkpoints. Raises GuiderailError if these or other numbers are out of range."""
    if args.samples < 2 or args.max_tokens < 2 or args.temperature <= 0 or (args.limit is not None and args.limit < 2):
        raise GuiderailError("-m, --max-tokens and --limit must be at least 2, --temperature positive")
    if not 0 <= args.alpha < 1:
        raise GuiderailError(f"--alpha {args.alpha}: must be at least 0 and less than 1")
    if args.checkpoints is None:
        return sorted({max(1, i * args.max_tokens // SEGMENTS) for i in range(1, SEGMENTS)})
    try:
        found = sorted({int(part) for part in args.checkpoints.split(",")})
    except ValueError:
        raise GuiderailError(f"--checkpoints {args.checkpoints}: expected numbers separated by commas") from None
    if found[0] < 1 or found[-1] >= args.max_tokens:
        raise GuiderailError(
            f"--checkpoints {args.checkpoints}: each must be at least 1 and less than --max-tokens {args.max_tokens}"
        )
    return found


async def evaluate_partial(
    state: "ServerState",
    prompts: "Prompts",
    reward: NamedReward,
    m: int,
    checkpoints: Sequence[int],
    alpha: float,
    sampling: "SamplingSpec",
    journal: Journal | None = None,
) -> dict[str, Any]:
    """The metrics for report.json; checkpoints ascending. Raises the errors of drawing and scoring."""
    import numpy as np

    from guiderail.server.offline.evaluate.draw import draw
    from guiderail.server.offline.evaluate.partial_metrics import partial_metrics

    (term,), journal = terms_of(state, [reward]), journal or Journal()
    pools = await draw(state, prompts, m, sampling, journal)
    pools, final, partial = await score_beginnings(state, pools, reward, checkpoints, journal)
    lengths = np.array([[len(answer.token_ids) for answer in pool.answers] for pool in pools])
    return {
        "m": m,
        "reward": describe_term(term),
        "tokens_per_answer": float(lengths.mean()),
        **partial_metrics(final, partial, lengths, checkpoints, alpha, sampling.seed or 0),
    }


async def score_beginnings(
    state: "ServerState",
    pools: "Sequence[AnswerPool]",
    reward: NamedReward,
    checkpoints: Sequence[int],
    journal: Journal | None = None,
) -> "tuple[list[AnswerPool], Any, Any]":
    """The pools that the reward can score, with rewards [P, M] of whole answers and [P, M, C] of their beginnings.

    Raises the errors of scoring.
    """
    from dataclasses import replace

    import numpy as np

    from guiderail.server.offline.evaluate.draw import score_all

    (term,) = terms_of(state, [reward])
    # An answer and its beginnings are neighbours, so that a reward model reads their shared prefix once.
    parts = []
    for pool in pools:
        versions = [[*(beginning(state, pool, each, c) for c in checkpoints), each] for each in pool.answers]
        parts.append(replace(pool, answers=tuple(version for each in versions for version in each)))
    whole, (scores,) = await score_all(state, parts, [term], journal)
    values = np.array(scores).reshape(len(whole), -1, len(checkpoints) + 1)
    return [pools[index] for index in whole], values[:, :, -1], values[:, :, :-1]


def beginning(state: "ServerState", pool: "AnswerPool", answer: "Answer", tokens: int) -> "Answer":
    """The first `tokens` tokens of an answer; the answer itself if it had ended by then."""
    from guiderail.guides.core.decoder import Decoder
    from guiderail.guides.core.types import Answer

    if len(answer.token_ids) <= tokens:
        return answer
    ids = answer.token_ids[:tokens]
    return Answer(Decoder(state.renderer, pool.prompt).text(ids), ids, partial=True)


def table(report: dict[str, Any]) -> str:
    """The metrics as lines of text."""
    lines = [f"{'tokens':>7}{'ended':>8}{'tau-b':>9}  {'95 % interval':18}{'best survives':>14}  95 % interval"]
    for row in report["checkpoints"]:
        tau, survives = row["tau"], row["winner_survives"]
        lines.append(
            f"{row['tokens']:7}{row['ended']:8.2f}{tau['value']:9.3f}  {_interval(tau):18}{survives['value']:14.3f}  "
            f"{_interval(survives)}"
        )
    every = report["all_checkpoints"]
    share, kept = every["tokens_share"], every["gain_kept"]
    return "\n".join([
        *lines,
        f"rejecting {report['alpha']:g} of the pool at each of these: reward {every['reward']['value']:.4f} (best of "
        f"{report['m']} {every['best_of_m']['value']:.4f}, plain {every['plain']['value']:.4f}),",
        f"{kept['value']:.3f} ({_interval(kept)}) of the gain over plain for {share['value']:.3f} of the tokens",
    ])  # fmt: skip


def _interval(value: dict[str, Any]) -> str:
    return f"{value['low']:.3f} to {value['high']:.3f}"
