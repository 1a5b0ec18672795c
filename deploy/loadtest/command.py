"""`guiderail loadtest` and `guiderail loadtest compare`. Imports nothing heavy before it runs."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guiderail.loadtest.flags import add_run_arguments, options_of

if TYPE_CHECKING:
    from guiderail.loadtest.client.session import Options
    from guiderail.loadtest.load.runner import Load, Run, Watcher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run, and the subcommand `compare`."""
    add_run_arguments(parser)
    tasks = parser.add_subparsers(dest="loadtest_task", metavar="compare")
    compare = tasks.add_parser("compare", help="compare two saved results: loadtest compare a.json b.json")
    compare.add_argument("a", type=Path, metavar="A.json")
    compare.add_argument("b", type=Path, metavar="B.json")
    compare.add_argument("--html", type=Path, metavar="FILE", help="also write the comparison as a page")


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 if no request completed. Raises LoadtestError if the test cannot be run."""
    if args.loadtest_task == "compare":
        from guiderail.loadtest.report.compare import compare

        compare(args.a, args.b, args.html)
        return 0
    import uvloop

    from guiderail.loadtest.report.table import show

    options = options_of(args)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result, runs = runner.run(_measure(options, not args.disable_tqdm))
    show(result)
    _save(args, options, result, runs)
    stages = result["stages"] if result["kind"] == "sweep" else [result]
    return 0 if any(stage["completed"] for stage in stages) else 1


async def _measure(options: "Options", show_progress: bool) -> "tuple[dict[str, Any], list[Run]]":
    from guiderail.loadtest.client.session import measure
    from guiderail.loadtest.load.progress import watcher

    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted() -> None:
        print("\nguiderail: stopping; the result so far follows (press Ctrl-C again to discard it)", file=sys.stderr)
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupted)

    def watch(title: str, load: "Load") -> "Watcher":
        return watcher(title, load, show_progress)

    return await measure(options, watch, stop)


def _save(args: argparse.Namespace, options: "Options", result: dict[str, Any], runs: "list[Run]") -> None:
    from dataclasses import replace

    from guiderail.loadtest.report.result import result_path, save_json, save_requests

    if not (args.save_result or args.save_requests or args.save_report):
        return
    about = replace(options.about, model=result["model_id"])
    path = result_path(args.result_dir, args.result_filename, about, result)
    saved = []
    if args.save_result:
        save_json(path, result)
        saved.append(path)
    if args.save_requests:
        saved.append(path.with_suffix(".requests.jsonl"))
        save_requests(saved[-1], runs)
    if args.save_report:
        from guiderail.loadtest.report.page import page

        saved.append(path.with_suffix(".html"))
        saved[-1].write_text(page(result, runs))
    print("saved " + ", ".join(map(str, saved)))
