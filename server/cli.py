"""The `guiderail` command. Imports nothing heavy: vLLM's processes import this module again."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

SERVE_FLAGS: list[tuple[str, dict[str, Any]]] = [
    ("model", {"help": "embedded name, local folder or Hub id (see `guiderail models`)"}),
    ("served-model-name", {"help": "name that requests use; default: the model's own"}),
    ("host", {"help": "address to listen on (127.0.0.1)"}),
    ("port", {"type": int, "help": "port to listen on (8000)"}),
    ("api-key", {"action": "append", "help": "require this bearer key; may be repeated"}),
    ("chat-template", {"help": "Jinja chat template, or the path of one"}),
    ("dtype", {"help": "auto (on CPU what its instruction set is fast in), float32, float16 or bfloat16"}),
    ("max-model-len", {"type": int, "help": "context length in tokens"}),
    ("kv-cache-gb", {"type": float, "help": "memory for KV pages, GiB (on CPU 2, on each GPU what is left)"}),
    ("gpu-memory-utilization", {"type": float, "help": "share of GPU memory for engine and rewards together (0.9)"}),
    ("max-num-seqs", {"type": int, "help": "rows decoded at once (on CPU 128, on a GPU as vllm serve)"}),
    ("max-num-batched-tokens", {"type": int, "help": "tokens of one step of the engine (as vllm serve)"}),
    ("tensor-parallel-size", {"type": int, "help": "GPUs to shard the model over (1)"}),
    ("compile", {"action": "store_const", "const": True, "help": "compile the model on CPU (slow start)"}),
    (
        "enforce-eager",
        {
            "action": "store_const",
            "const": True,
            "help": "no CUDA graphs and no compilation on a GPU (slower, less memory)",
        },
    ),
    (
        "batch-invariant",
        {
            "action": "store_const",
            "const": True,
            "help": "no answer depends on what runs beside it (on CPU: float32); README says what a seed promises",
        },
    ),
    ("lora", {"action": "append", "metavar": "NAME=PATH", "help": "serve a LoRA adapter; may be repeated"}),
    ("max-lora-rank", {"type": int, "help": "largest rank of an adapter (16)"}),
    (
        "policy",
        {
            "action": "append",
            "metavar": "NAME=URL[,KEY=VALUE]",
            "help": "a policy on another vLLM server, as a guide's baseline (keys: model, key_env); may be repeated",
        },
    ),
    ("guides", {"metavar": "A,B", "help": "load only these guides"}),
    ("rewards", {"metavar": "A,B", "help": "load only these rewards"}),
    (
        "reward",
        {
            "action": "append",
            "metavar": "NAME=PATH[,KEY=VALUE]",
            "help": "serve a reward model (folder, Hub id or bundled head); keys: backend, head, dtype, kv_gb, device; "
            "on remote vLLM pooling servers: backend=vllm, url=http://host:port[|...], model, key_env",
        },
    ),
    (
        "calibration",
        {"action": "append", "metavar": "FILE", "help": "stored calibration of a reward (guiderail rewards calibrate)"},
    ),
    ("encoder", {"help": "sentence encoder for mbr selection: folder or Hub id (the embedded all-MiniLM-L6-v2)"}),
    ("urial", {"action": "append", "metavar": "NAME=FILE.md", "help": "a style for prompter urial; may be repeated"}),
    ("cache-dir", {"help": "folder for converted models (~/.cache/guiderail)"}),
    ("drain-timeout-s", {"type": float, "help": "seconds that requests in flight get at shutdown (10)"}),
]


# Commands in modules of their own, with add_arguments and run; importing them is cheap.
TASKS = {
    "rewards train": ("server.offline.train.train_head", "fit a Bradley-Terry head on preference pairs"),
    "rewards evaluate": ("server.offline.evaluate.reward_pairs", "how well rewards rank preference pairs"),
    "rewards calibrate": ("server.offline.calibrate", "store a reward's quantiles under the served model"),
    "loadtest": ("loadtest.command", "load-test any OpenAI-compatible server"),
    "evaluate curve": ("server.offline.evaluate.curve", "gold reward of best-of-N against N and KL"),
    "evaluate partial-correlation": ("server.offline.evaluate.partial", "how well partial rewards tell final ones"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors that Guiderail knows are one line on stderr."""
    _leave_source_folder()
    args = _parser().parse_args(argv)
    from guiderail.guides.core.errors import GuiderailError
    from guiderail.server.settings import load

    try:
        if hasattr(args, "run"):  # a command of its own module
            status: int = args.run(args)
            return status
        flags = _flags(args)
        settings = load(flags, getattr(args, "config", None))
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
    """Takes the project's root off sys.path (where `python -m` puts it): transformers would import kernels/ from it."""
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != root]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="guiderail", description="Aligns a language model while it decodes.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('guiderail')}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a model", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    serve.add_argument("--config", metavar="FILE.yaml", help="settings, profiles and limits (deploy/profiles)")
    for name, options in SERVE_FLAGS:
        serve.add_argument(f"--{name}", **options)
    models = commands.add_parser("models", help="list the embedded models, or prepare one")
    models.add_argument("prepare", nargs="?", metavar="NAME", help="convert this model into the cache now")
    models.add_argument("--cache-dir", default=argparse.SUPPRESS)
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


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    names = {name.replace("-", "_") for name, _ in SERVE_FLAGS}
    flags = {key: value for key, value in vars(args).items() if key in names}
    for flag, module in (("reward", "rewards.models.reward_spec"), ("policy", "engines.remote.policy_spec")):
        if flag in flags:
            spec = import_module(f"guiderail.server.{module}")
            flags[flag] = dict(spec.parse_flag(item) for item in flags[flag])
    for flag in ("lora", "urial"):
        if flag in flags:
            from guiderail.server.settings import SettingsError

            pairs = [item.partition("=") for item in flags[flag]]
            if not all(name and path for name, _, path in pairs):
                raise SettingsError(f"--{flag} takes NAME=PATH")
            flags[flag] = {name: path for name, _, path in pairs}
    return flags


if __name__ == "__main__":
    sys.exit(main())
