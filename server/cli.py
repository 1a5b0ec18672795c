"""The `guiderail` command. Imports nothing heavy: vLLM's processes import this module again."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

# Commands in modules of their own, with add_arguments and run; importing them is cheap.
TASKS = {
    "rewards train": ("server.offline.train.train_head", "fit a Bradley-Terry head on preference pairs"),
    "rewards evaluate": ("server.offline.evaluate.reward_pairs", "how well rewards rank preference pairs"),
    "rewards calibrate": ("server.offline.calibrate", "store a reward's quantiles under the served model"),
    "loadtest": ("loadtest.command", "load-test any OpenAI-compatible server"),
    "try-guide": ("server.offline.try_guide", "run a guide of a file on one prompt, without a server"),
    "evaluate curve": ("server.offline.evaluate.curve", "gold reward of best-of-N against N and KL"),
    "evaluate partial-correlation": ("server.offline.evaluate.partial", "how well partial rewards tell final ones"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status. Errors that Guiderail knows are one line on stderr."""
    _leave_source_folder()
    _open_standard_streams()
    args = _parser().parse_args(argv)
    from guiderail.guides.core.errors import GuiderailError
    from guiderail.server.serve_flags import given
    from guiderail.server.settings import load

    try:
        if hasattr(args, "run"):  # a command of its own module
            status: int = args.run(args)
            return status
        settings = load(given(args), getattr(args, "config", None))
        if args.command == "serve":
            from guiderail.server.runtime import serve

            return serve(settings)
        from guiderail.server.offline import listing

        if args.command == "models":
            return listing.models(settings, args.prepare)
        if args.command == "version":
            return listing.version()
        return listing.plugins(args.command)
    except KeyboardInterrupt:
        print("guiderail: stopped", file=sys.stderr)
        return 130
    except GuiderailError as error:
        print(f"guiderail: {error}", file=sys.stderr)
        return 1


def _leave_source_folder() -> None:
    """Take the project's root off sys.path (where `python -m` puts it): transformers would import kernels/ from it."""
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != root]


def _open_standard_streams() -> None:
    """Open what of 0, 1 and 2 the shell closed (`>&-`): a connection would take its number, and uvloop abort at it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _parser() -> argparse.ArgumentParser:
    from guiderail.server.serve_flags import add_flags

    parser = argparse.ArgumentParser(prog="guiderail", description="Aligns a language model while it decodes.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('guiderail')}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a model", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    serve.add_argument("--config", metavar="FILE.yaml", help="settings, profiles and limits (deploy/profiles)")
    add_flags(serve)
    models = commands.add_parser(
        "models", help="list the embedded models, or prepare one", argument_default=argparse.SUPPRESS
    )
    models.add_argument(
        "prepare", nargs="?", default=None, metavar="NAME", help="convert this model into the cache now"
    )
    add_flags(models, ["cache_dir"])
    commands.add_parser("guides", help="list the guides")
    rewards = commands.add_parser("rewards", help="list the rewards; train, evaluate or calibrate one")
    evaluate = commands.add_parser("evaluate", help="measure the served model under a reward")
    groups = {"rewards": rewards.add_subparsers(dest="task"), "evaluate": evaluate.add_subparsers(required=True)}
    for name, (module, text) in TASKS.items():
        group, _, task = name.rpartition(" ")
        command = import_module(f"guiderail.{module}")
        sub = (groups[group] if group else commands).add_parser(task, help=text, description=command.__doc__)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    commands.add_parser("version", help="print the version")
    return parser


if __name__ == "__main__":
    sys.exit(main())
