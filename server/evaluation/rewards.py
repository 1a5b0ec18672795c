"""`guiderail rewards evaluate`: what rewards make of preference pairs, as figures, pictures and report.json.

A reward's raw values are compared within pairs. Nothing here is fitted except the temperature, on the same
pairs, which the report says. The engine is started only for rewards that ask for it.
"""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guiderail.guides.errors import GuiderailError, PluginError
from guiderail.server.evaluation.options import (
    REWARD_HELP,
    NamedReward,
    add_engine_arguments,
    describe_term,
    output_folder,
    parse_reward,
    settings_for,
    terms_of,
    write_report,
)

if TYPE_CHECKING:
    from guiderail.server.state import ServerState
    from guiderail.server.training.pairs import Pair, PairFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("--pairs", required=True, metavar="FILE", help="preference pairs, .jsonl or .jsonl.gz")
    # Its name in the namespace must not be that of the setting `reward`, which the command line would read.
    add("--reward", dest="scored", required=True, action="append", metavar="REWARD", help=f"{REWARD_HELP}; repeatable")
    add("--limit", type=int, metavar="N", help="use the first N pairs alone")
    add("--out", required=True, metavar="FOLDER", help="folder for report.json and the pictures, new or empty")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status. Raises GuiderailError."""
    from guiderail.server.engines.absent import EngineNeeded
    from guiderail.server.evaluation.reward_report import draw_report, table
    from guiderail.server.offline import run_offline
    from guiderail.server.serve import say
    from guiderail.server.training.pairs import read_pairs

    out = output_folder(args.out)
    if args.limit is not None and args.limit < 1:
        raise GuiderailError("--limit must be at least 1")
    rewards = [parse_reward(text) for text in args.scored]
    settings = settings_for(args, rewards)
    data = read_pairs(Path(args.pairs))

    async def main(state: "ServerState") -> int:
        report = await evaluate_rewards(state, rewards, data.pairs[: args.limit])
        report = {"created": datetime.now(UTC).date().isoformat(), "pairs": _source(args, data), **report}
        write_report(out, report)
        draw_report(out, report)
        print(table(report))
        print(out)
        return 0

    try:
        return run_offline(settings, main, engine=False)
    except EngineNeeded:
        pass
    except PluginError as error:
        if not isinstance(error.__cause__, EngineNeeded):
            raise
    say("a reward needs the engine")
    return run_offline(settings, main)


async def evaluate_rewards(
    state: "ServerState", rewards: Sequence[NamedReward], pairs: "Sequence[Pair]"
) -> dict[str, Any]:
    """The figures of each reward by its label, and of the two rules about length, for report.json.

    Raises GuiderailError for wrong parameters, RewardFailed, and EngineNeeded before the bulk of the work.
    """
    import numpy as np

    from guiderail.guides.types import Answer
    from guiderail.server.evaluation.draw import AnswerPool, score, tokens_of
    from guiderail.server.evaluation.pair_figures import credit, wilson
    from guiderail.server.evaluation.reward_report import reward_figures

    terms = terms_of(state, rewards)
    pools = []
    for pair in pairs:
        answers = (Answer(text, tuple(state.renderer.encode(text))) for text in (pair.chosen, pair.rejected))
        pools.append(AnswerPool(pair.messages, tokens_of(state, pair.messages), tuple(answers)))
    for term in terms:  # a reward that cannot work says so now, and not after the others have been scored
        await score(state, pools[:1], term)
    lengths = np.array([[len(answer.token_ids) for answer in pool.answers] for pool in pools], float)
    longer_by = lengths[:, 0] - lengths[:, 1]
    figures = {}
    for term in terms:
        values = np.array(await score(state, pools, term))
        figures[term.label] = {"reward": describe_term(term), **reward_figures(values, lengths)}
    return {
        "tokenizer": state.settings.model_name,
        "shorter_wins": wilson(credit(-longer_by)),
        "longer_wins": wilson(credit(longer_by)),
        "rewards": figures,
    }


def _source(args: argparse.Namespace, data: "PairFile") -> dict[str, Any]:
    return {
        "file": Path(args.pairs).name,
        "sha256": data.sha256,
        "pairs": len(data.pairs[: args.limit]),
        "left_out": data.skipped,
    }
