"""`guiderail evaluate partial-correlation`: do rewards of partial answers tell which answers will be the best?

Speculative rejection (Sun et al., arXiv 2410.20290) gives answers up by what they are worth so far; it rests on that.
M answers to each prompt are drawn from the served model; each is scored whole, and as it stood after its first c
tokens, for each checkpoint c. Reported are Kendall's tau-b between partial and final rewards within prompts, the share
of prompts whose best answer outlives the rejection of the lower alpha-quantile at c, and what rejecting at all
checkpoints in turn would keep of best-of-M's reward and save of its tokens. Intervals are bootstraps over prompts. A
prompt that the reward fails on is named and left out.

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
    from guiderail.guides.core.types import Answer, Message, SamplingSpec
    from guiderail.server.offline.evaluate.draw import AnswerPool
    from guiderail.server.state import ServerState

SEGMENTS = 4  # of an answer, between the default checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE", help='.jsonl or .jsonl.gz of {"messages": [...]} or {"prompt": ""}')
    # Its name in the namespace must not be that of the setting `reward`, which the command line would read.
    add("--reward", dest="scored", required=True, metavar="REWARD", help=REWARD_HELP)
    add("-m", "--samples", type=int, default=32, metavar="M", help="answers drawn for each prompt (32)")
    add("--checkpoints", metavar="C,C,...", help="numbers of tokens (quarters of --max-tokens)")
    add("--alpha", type=float, default=0.5, help="share of the answers that a checkpoint rejects (0.5)")
    add("--max-tokens", type=int, default=64, help="tokens of an answer at most (64)")
    add("--temperature", type=float, default=1.0, help="sampling temperature (1)")
    add("--seed", type=int, default=0, help="seed of the answers and of the bootstrap (0)")
    add("--limit", type=int, metavar="N", help="use the first N prompts alone")
    add("--out", required=True, metavar="FOLDER", help="folder for report.json and partial.png, new or empty")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status. Raises GuiderailError."""
    from guiderail.guides.core.types import SamplingSpec
    from guiderail.server.offline.evaluate.partial_plot import draw_partial
    from guiderail.server.offline.offline_state import run_offline
    from guiderail.server.offline.prompt_file import read_prompts

    checkpoints = _checkpoints(args)
    out = output_folder(args.out)
    reward = parse_reward(args.scored)
    settings = settings_for(args, [reward])
    file = read_prompts(Path(args.prompts))
    prompts = file.prompts[: args.limit]
    if len(prompts) < 2:
        raise GuiderailError(f"--prompts {args.prompts}: at least 2 prompts are needed for an interval")
    sampling = SamplingSpec(args.max_tokens, args.temperature, seed=args.seed)

    kept = ("scored", "samples", "checkpoints", "alpha", "max_tokens", "temperature", "seed", "limit")
    with journal_of(out, settings, ours=kept, args=args, data=file.sha256) as journal:

        async def main(state: "ServerState") -> int:
            pin_weights(journal, state)
            m, alpha = args.samples, args.alpha
            figures = await evaluate_partial(state, prompts, reward, m, checkpoints, alpha, sampling, journal)
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
                draw_partial(folder / "partial.png", report)
            journal.finish()
            print(table(report))
            print(out)
            return 0

        return run_offline(settings, main)


def _checkpoints(args: argparse.Namespace) -> list[int]:
    """The checkpoints. Raises GuiderailError for these and other numbers that make no sense."""
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
    prompts: "Sequence[tuple[Message, ...]]",
    reward: NamedReward,
    m: int,
    checkpoints: Sequence[int],
    alpha: float,
    sampling: "SamplingSpec",
    journal: Journal | None = None,
) -> dict[str, Any]:
    """The figures for report.json; checkpoints ascending. Raises what drawing and scoring raise."""
    import numpy as np

    from guiderail.server.offline.evaluate.draw import draw
    from guiderail.server.offline.evaluate.partial_metrics import partial_figures

    (term,), journal = terms_of(state, [reward]), journal or Journal()
    pools = await draw(state, prompts, m, sampling, journal)
    pools, final, partial = await score_beginnings(state, pools, reward, checkpoints, journal)
    lengths = np.array([[len(answer.token_ids) for answer in pool.answers] for pool in pools])
    return {
        "m": m,
        "reward": describe_term(term),
        "tokens_per_answer": float(lengths.mean()),
        **partial_figures(final, partial, lengths, checkpoints, alpha, sampling.seed or 0),
    }


async def score_beginnings(
    state: "ServerState",
    pools: "Sequence[AnswerPool]",
    reward: NamedReward,
    checkpoints: Sequence[int],
    journal: Journal | None = None,
) -> "tuple[list[AnswerPool], Any, Any]":
    """The pools that the reward does not fail on, and rewards [P, M] of their whole answers and [P, M, C] of the
    answers' beginnings. Raises what scoring raises."""
    from dataclasses import replace

    import numpy as np

    from guiderail.server.offline.evaluate.draw import score_all

    (term,) = terms_of(state, [reward])
    # An answer's beginnings stand beside it, so that a reward model reads what they share once.
    parts = []
    for pool in pools:
        versions = [[*(beginning(state, pool, each, c) for c in checkpoints), each] for each in pool.answers]
        parts.append(replace(pool, answers=tuple(version for each in versions for version in each)))
    whole, (scores,) = await score_all(state, parts, [term], journal)
    values = np.array(scores).reshape(len(whole), -1, len(checkpoints) + 1)
    return [pools[index] for index in whole], values[:, :, -1], values[:, :, :-1]


def beginning(state: "ServerState", pool: "AnswerPool", answer: "Answer", tokens: int) -> "Answer":
    """What an answer was after so many tokens; one that had ended by then is itself."""
    from guiderail.guides.core.decoder import Decoder
    from guiderail.guides.core.types import Answer

    if len(answer.token_ids) <= tokens:
        return answer
    ids = answer.token_ids[:tokens]
    return Answer(Decoder(state.renderer, pool.prompt).text(ids), ids, partial=True)


def table(report: dict[str, Any]) -> str:
    """The figures as lines of text."""
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
