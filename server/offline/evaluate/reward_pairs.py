"""`guiderail rewards evaluate`: rewards on preference pairs, as metrics, pictures and report.json.

A reward's raw values are compared within pairs. Nothing is fitted except the temperature, on the same pairs, as
the report says. The engine is started only for rewards that need it. A pair that one reward fails on (because it is
too long for it, say) is named and left out for all rewards, so that they are compared on the same pairs.

Scores are kept in OUT.progress.jsonl until the report is written; after an interruption the same command resumes there.
"""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guiderail.guides.core.errors import GuiderailError, PluginError
from guiderail.server.offline.journal import Journal, whole_folder
from guiderail.server.offline.options import (
    REWARD_HELP,
    NamedReward,
    add_engine_arguments,
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
    from guiderail.server.offline.train.pairs import Pair, PairFile
    from guiderail.server.state import ServerState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("--pairs", required=True, metavar="FILE", help="preference pairs, .jsonl or .jsonl.gz")
    # Its name in the namespace must not be that of the setting `reward`, which the command line would read.
    add("--reward", dest="scored", required=True, action="append", metavar="REWARD", help=f"{REWARD_HELP}; repeatable")
    add("--limit", type=int, metavar="N", help="use only the first N pairs")
    add("--out", required=True, metavar="FOLDER", help="folder for report.json and the pictures, new or empty")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status. Raises GuiderailError."""
    from guiderail.server.announce import say
    from guiderail.server.engines.null import EngineNeeded
    from guiderail.server.offline.evaluate.reward_report import draw_report, table
    from guiderail.server.offline.offline_state import run_offline
    from guiderail.server.offline.train.pairs import read_pairs

    out = output_folder(args.out)
    if args.limit is not None and args.limit < 1:
        raise GuiderailError("--limit must be at least 1")
    rewards = [parse_reward(text) for text in args.scored]
    settings = settings_for(args, rewards)
    data = read_pairs(Path(args.pairs))
    with journal_of(out, settings, ours=("scored", "limit"), args=args, data=data.sha256) as journal:

        async def main(state: "ServerState") -> int:
            pin_weights(journal, state)
            report = await evaluate_rewards(state, rewards, data.pairs[: args.limit], journal)
            source = _source(args, data, journal)
            report = {"created": datetime.now(UTC).date().isoformat(), "pairs": source, **report}
            report["failed"] = journal.failed
            with whole_folder(out) as folder:
                write_report(folder, report)
                draw_report(folder, report)
            journal.finish()
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
    state: "ServerState", rewards: Sequence[NamedReward], pairs: "Sequence[Pair]", journal: Journal | None = None
) -> dict[str, Any]:
    """The metrics of each reward by its label, and of the two rules about length, for report.json.

    Raises GuiderailError for wrong parameters or if no pair is left, RewardFailed if a reward fails on most pairs, and
    EngineNeeded early, before most of the work.
    """
    import numpy as np

    from guiderail.guides.core.types import Answer
    from guiderail.server.offline.evaluate.draw import AnswerPool, score, score_all, tokens_of
    from guiderail.server.offline.evaluate.pair_metrics import credit, wilson
    from guiderail.server.offline.evaluate.reward_report import reward_metrics

    terms, journal = terms_of(state, rewards), journal or Journal()
    pools = []
    for pair in pairs:
        answers = (
            Answer(text, tuple(state.renderer.encode(text, plain=True))) for text in (pair.chosen, pair.rejected)
        )
        prompt = tokens_of(state, pair.messages)
        pools.append(AnswerPool(pair.messages, prompt, tuple(answers), f"the pair of line {pair.line}"))
    for term in terms:  # a reward that needs the engine says so now, before the others are scored
        await score(state, pools[:1], term, journal)
    whole, columns = await score_all(state, pools, terms, journal)
    lengths = np.array([[len(answer.token_ids) for answer in pools[index].answers] for index in whole], float)
    longer_by = lengths[:, 0] - lengths[:, 1]
    metrics = {}
    for term, values in zip(terms, columns, strict=True):
        metrics[term.label] = {"reward": describe_term(term), **reward_metrics(np.array(values), lengths)}
    return {
        "tokenizer": state.settings.model_name,
        "shorter_wins": wilson(credit(-longer_by)),
        "longer_wins": wilson(credit(longer_by)),
        "rewards": metrics,
    }


def _source(args: argparse.Namespace, data: "PairFile", journal: Journal) -> dict[str, Any]:
    return {
        "file": Path(args.pairs).name,
        "sha256": data.sha256,
        "pairs": len(data.pairs[: args.limit]) - len(journal.failed),
        "left_out": data.skipped,
    }
