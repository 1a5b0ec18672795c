"""`guiderail rewards train`: from preference pairs to a folder with a reward head, its report and its card.

The features of the answers are kept in OUT.progress.jsonl and each epoch of fine-tuning in OUT.progress.pt until the
folder is written; after an interruption the same command resumes from there.

Imports nothing heavy at its top, because the command line imports it for the arguments.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guiderail.server.offline.journal import Journal, beside, whole_folder

if TYPE_CHECKING:
    from torch import Tensor

    from guiderail.server.offline.train.pairs import PairFile

FORMAT = "guiderail-reward-head"
WEIGHTS, CONFIG = "head.safetensors", "reward.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command. Their names differ from all settings of `guiderail serve`."""
    add = parser.add_argument
    add("--pairs", required=True, metavar="FILE", help="preference pairs, .jsonl or .jsonl.gz")
    add("--base", metavar="NAME", help="backbone: embedded name, folder or Hub id (smollm2-135m-instruct)")
    add("--out", metavar="FOLDER", help="folder to write, new or empty (PAIRS-BASE in the current folder)")
    add("--max-tokens", type=int, default=256, help="tokens of prompt and answer, cut on the left (256)")
    add("--held-out", type=float, default=0.25, metavar="SHARE", help="share of conversations held out (0.25)")
    add("--folds", type=int, default=5, help="cross-validation folds inside the training part (5)")
    add("--seed", type=int, default=0, help="seed of the split, the folds and fine-tuning (0)")
    add("--unfreeze", type=int, default=0, metavar="N", help="also fine-tune the last N layers (0; slow on CPU)")
    add("--lr", type=float, default=1e-5, help="learning rate of those layers (1e-5)")
    add("--epochs", type=int, default=5, help="maximum epochs of fine-tuning; one fold decides on stopping early (5)")
    add("--data-name", default="unnamed", metavar="TEXT", help="name of the data, for the card")
    add("--data-licence", default="not stated", metavar="TEXT", help="licence of the data, for the card")
    add("--threads", type=int, metavar="N", help="CPU threads (torch's choice)")


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0. Raises GuiderailError for wrong arguments, pairs or bases."""
    from guiderail.server.offline.train.pairs import TrainingError, read_pairs

    fault = _fault(args)
    if fault:
        raise TrainingError(fault)
    source = Path(args.pairs)
    if args.base is None:
        from guiderail.server.models.catalogue import DEFAULT_MODEL

        args.base = DEFAULT_MODEL
    name = source.name.removesuffix(".gz").removesuffix(".jsonl")
    out = Path(args.out or f"{name}-{Path(args.base).name}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"--out {out}: already exists and is not an empty folder")
    data = read_pairs(source)
    _say(f"{len(data.pairs)} pairs; lines left out: {data.skipped or 'none'}")
    ours = ("base", "max_tokens", "held_out", "folds", "seed", "unfreeze", "lr", "epochs")
    facts = {"data": data.sha256, **{name: getattr(args, name) for name in ours}}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the command as Ctrl-C does
    try:
        with Journal(beside(out), facts, _say) as journal:
            report, weight, tuned = _run(args, data, journal, _epochs(out))
            _write(out, args, report, weight, tuned)
            journal.finish()
            _epochs(out).unlink(missing_ok=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    from guiderail.server.offline.train.train_report import verdict

    held = report["held_out"]
    for title, key in (("this head", "accuracy"), ("shorter wins", "shorter_wins"), ("longer wins", "longer_wins")):
        print(f"{title:13}{held[key]['value']:.3f} ± {held[key]['se']:.3f}   (held-out pairs: {held['pairs']})")
    print(verdict(held))
    print(out)
    return 0


def _fault(args: argparse.Namespace) -> str | None:
    checks = [
        (args.max_tokens >= 16, "--max-tokens must be at least 16"),
        (0 < args.held_out < 1, "--held-out must lie between 0 and 1"),
        (args.folds >= 2, "--folds must be at least 2"),
        (args.unfreeze >= 0, "--unfreeze must be at least 0"),
        (args.lr > 0, "--lr must be positive"),
        (args.epochs >= 1, "--epochs must be at least 1"),
        (args.threads is None or args.threads >= 1, "--threads must be at least 1"),
    ]
    return next((text for fine, text in checks if not fine), None)


def _epochs(out: Path) -> Path:
    return out.with_name(f"{out.name}.progress.pt")


def _run(
    args: argparse.Namespace, data: "PairFile", journal: Journal, epochs: Path
) -> "tuple[dict[str, Any], Tensor, dict[str, Tensor]]":
    """Report, weight [H] float32 and tuned parameters. The held-out answers are scored only in the last step."""
    import numpy as np
    import torch

    from guiderail.server.models import catalogue
    from guiderail.server.models.model_fingerprint import fingerprint
    from guiderail.server.models.renderer import ChatRenderer
    from guiderail.server.offline.evaluate.pair_metrics import credit, estimate, evaluate
    from guiderail.server.offline.train import features as reading
    from guiderail.server.offline.train import head_fit as head
    from guiderail.server.offline.train.checkpoint import Checkpoint
    from guiderail.server.settings import Settings

    began = time.monotonic()
    if args.threads:
        torch.set_num_threads(args.threads)
    keys = [pair.key for pair in data.pairs]
    apart = head.held_out(keys, args.seed, args.held_out)
    inside = [index for index, out in enumerate(apart) if not out]
    outside = [index for index, out in enumerate(apart) if out]
    fold = head.folds([keys[index] for index in inside], args.seed, args.folds)

    folder = catalogue.resolve(args.base, Settings().cache, _say)
    journal.pin(base_revision=fingerprint(folder))
    tokens = reading.tokenize(ChatRenderer(folder), data.pairs, args.max_tokens)
    sequences = [answer.ids for answer in tokens]
    model = reading.load_backbone(folder)

    def states_of(pairs: Sequence[int], title: str) -> "Tensor":
        return reading.features(
            model, [sequences[2 * pair + side] for pair in pairs for side in (0, 1)], title, journal
        )

    states = states_of(inside, "features")
    chosen, rejected = states[0::2], states[1::2]

    l2, tried = head.cross_validate(chosen, rejected, fold)
    weight, _ = head.fit_folded(chosen, rejected, l2)
    tuning, parameters = None, {}
    if args.unfreeze:
        seen = torch.tensor(fold) != 0
        tuned = head.finetune(
            model,
            sequences,
            head.fit_folded(chosen[seen], rejected[seen], l2),
            [index for index, number in zip(inside, fold, strict=True) if number != 0],
            [index for index, number in zip(inside, fold, strict=True) if number == 0],
            layers=args.unfreeze,
            l2=l2,
            lr=args.lr,
            epochs=args.epochs,
            seed=args.seed,
            checkpoint=Checkpoint(epochs, journal.run),
        )
        tuning = {"best_epoch": tuned.best_epoch, "validation_loss": tuned.validation_loss}
        if tuned.best_epoch:  # otherwise the frozen head, fitted on the whole training part, is kept
            weight, parameters = tuned.weight, tuned.parameters
            states = states_of(inside, "tuned features")

    kept = weight.float()  # what is saved is what is evaluated
    trained = (states.double() @ kept.double()).numpy()
    _say("scoring the held-out part, once")
    states = states_of(outside, "held out")
    scores = (states.double() @ kept.double()).numpy()
    lengths = np.array([[tokens[2 * index + side].answer_length for side in (0, 1)] for index in outside], float)
    embedded = catalogue.EMBEDDED.get(args.base)
    result = {
        "created": datetime.now(UTC).date().isoformat(),
        "seconds": None if journal.resumed else time.monotonic() - began,
        "data": {
            "name": args.data_name,
            "licence": args.data_licence,
            "file": Path(args.pairs).name,
            "sha256": data.sha256,
            "pairs": len(data.pairs),
            "skipped": data.skipped,
            "train": len(inside),
            "held_out": len(outside),
            "cut_share": sum(answer.cut > 0 for answer in tokens) / len(tokens),
        },
        "recipe": {
            "base": args.base,
            "base_revision": embedded.sha256 if embedded else None,
            "max_tokens": args.max_tokens,
            "held_out": args.held_out,
            "folds": args.folds,
            "seed": args.seed,
            "l2": l2,
            "unfreeze": args.unfreeze,
            "lr": args.lr if args.unfreeze else None,
            "epochs": args.epochs if args.unfreeze else None,
        },
        "cross_validation": [
            {"l2": t.l2, "log_loss": t.log_loss, "log_loss_se": t.log_loss_se, "accuracy": t.accuracy} for t in tried
        ],
        "cross_validation_accuracy": next(t.accuracy for t in tried if t.l2 == l2),
        "fine_tuning": tuning,
        "train": {"accuracy": estimate(credit(trained[0::2] - trained[1::2]))},
        "held_out": evaluate(scores[0::2], scores[1::2], lengths[:, 0], lengths[:, 1]),
    }
    return result, kept, parameters


def reward_config(report: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """Contents of reward.json, which marks the folder as a reward head for the server."""
    recipe = report["recipe"]
    return {
        "format": FORMAT,
        "version": 1,
        "base": recipe["base"],
        "base_revision": recipe["base_revision"],
        "hidden_size": hidden_size,
        "heads": ["score"],
        "max_tokens": recipe["max_tokens"],
        "created": report["created"],
    }


def exact_command(args: argparse.Namespace, out: Path) -> str:
    """The command line that makes the same head: every argument that matters, files without their folders."""
    words = ["guiderail", "rewards", "train", "--pairs", Path(args.pairs).name, "--base", args.base, "--out", out.name]
    names = ["max_tokens", "held_out", "folds", "seed", "unfreeze"]
    names += ["lr", "epochs"] if args.unfreeze else []
    for name in [*names, "data_name", "data_licence"]:
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return shlex.join(words)


def save_weights(folder: Path, weight: "Tensor", tuned: "dict[str, Tensor]") -> None:
    """Write head.safetensors, float32: `score.weight` [1, H] and, whole, the base's parameters that were tuned."""
    from safetensors.torch import save_file

    tensors = {"score.weight": weight.float().reshape(1, -1), **{name: p.float() for name, p in tuned.items()}}
    path = folder / WEIGHTS
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _write(
    out: Path, args: argparse.Namespace, report: dict[str, Any], weight: "Tensor", tuned: "dict[str, Tensor]"
) -> None:
    from guiderail.server.offline.train.train_report import card, reliability_plot

    with whole_folder(out) as folder:
        save_weights(folder, weight, tuned)
        (folder / CONFIG).write_text(json.dumps(reward_config(report, weight.numel()), indent=2) + "\n")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "README.md").write_text(card(report, exact_command(args, out)))
        reliability_plot(folder / "reliability.png", report["held_out"], out.name)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on its own: `python -P -m guiderail.server.offline.train.train_head`."""
    from guiderail.guides.core.errors import GuiderailError

    parser = argparse.ArgumentParser(prog="guiderail rewards train", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except GuiderailError as error:
        print(f"guiderail: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
