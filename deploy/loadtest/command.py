"""`guiderail loadtest` and `guiderail loadtest compare`. Imports nothing heavy before it runs."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

        with _while_somebody_reads():
            compare(args.a, args.b, args.html)
        return 0
    import uvloop

    from guiderail.loadtest.client.open_files import allow
    from guiderail.loadtest.report.saving import prepare
    from guiderail.loadtest.report.table import show

    options = options_of(args)
    allow(options.load, options.sweep)
    saves = args.save_result or args.save_detailed or args.save_requests or args.save_report
    if saves:
        prepare(args.result_dir, args.result_filename)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result, saved = runner.run(_measured_and_saved(args, options, saves))
    with _while_somebody_reads():
        show(result)
        if saved:
            print("saved " + ", ".join(map(str, saved)))
    stages = result["stages"] if result["kind"] == "sweep" else [result]
    return 0 if any(stage["completed"] for stage in stages) else 1


async def _measured_and_saved(
    args: argparse.Namespace, options: "Options", saves: bool
) -> "tuple[dict[str, Any], list[Path]]":
    """The result, and the files that it is saved in. It is saved first: whatever cannot be shown then is not lost."""
    from guiderail.loadtest.client.session import measure
    from guiderail.loadtest.load.progress import watcher

    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted(number: signal.Signals) -> None:
        stop.set()
        if number == signal.SIGINT:
            loop.remove_signal_handler(number)  # a second one raises KeyboardInterrupt
        with suppress(OSError):  # nobody may be reading
            print("\nguiderail: stopping; the result so far follows (Ctrl-C discards it)", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            loop.add_signal_handler(number, interrupted, number)

    def watch(title: str, load: "Load") -> "Watcher":
        return watcher(title, load, not args.disable_tqdm)

    result, runs = await measure(options, watch, stop)
    return result, _save(args, options, result, runs) if saves else []


def _save(args: argparse.Namespace, options: "Options", result: dict[str, Any], runs: "list[Run]") -> "list[Path]":
    from dataclasses import replace

    from guiderail.loadtest.report.saving import beside, json_text, requests_text, result_path, save

    about = replace(options.about, model=result["model_id"])
    path = result_path(args.result_dir, args.result_filename, about, result)
    saved = []
    if args.save_result or args.save_detailed:
        saved.append(save(path, json_text(result)))
    if args.save_requests:
        saved.append(save(beside(path, ".requests.jsonl"), requests_text(runs)))
    if args.save_report:
        from guiderail.loadtest.report.page import page

        saved.append(save(beside(path, ".html"), page(result, runs)))
    return saved


@contextmanager
def _while_somebody_reads() -> Iterator[None]:
    """Write to standard output in the block; if it is closed or full, what is left to write goes nowhere."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, SystemExit):  # the latter is rich's way to say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's exit fails at it too
