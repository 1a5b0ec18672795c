"""Parts shared by the offline commands: flags of the served model, rewards on the command line, journal and report.

Imports nothing heavy at its top, because the command line imports it for the arguments.
"""

import argparse
import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.offline.journal import Journal, beside, whole_folder
from guiderail.server.strict_json import JsonFault, read_body

if TYPE_CHECKING:
    from guiderail.guides.core.types import Message, SamplingSpec
    from guiderail.guides.scoring import RewardTerm
    from guiderail.server.offline.prompt_file import PromptFile
    from guiderail.server.settings import Settings
    from guiderail.server.state import ServerState

    Prompts = Sequence[tuple[Message, ...]]
    Measure = Callable[[ServerState, Prompts, SamplingSpec, Journal], Awaitable[dict[str, object]]]

ENGINE_SETTINGS = (
    "model", "chat_template", "dtype", "max_model_len", "kv_cache_gb", "gpu_memory_utilization", "max_num_seqs",
    "tensor_parallel_size", "compile", "cache_dir",
)  # fmt: skip
REWARD_HELP = (
    'a reward\'s name, {"name": ..., parameters} as JSON, or NAME=PATH[,KEY=VALUE] for a reward model as in '
    "`guiderail serve --reward`"
)


@dataclass(frozen=True, slots=True)
class NamedReward:
    """A reward of the command line: its entry in the alignment object, and its model if one was given by path."""

    spec: dict[str, object]
    model: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """The reward's name."""
        return str(self.spec["name"])


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config and the flags of `guiderail serve` that determine which model is served and how."""
    from guiderail.server.serve_flags import add_flags

    group = parser.add_argument_group("the served model, as for `guiderail serve`", argument_default=argparse.SUPPRESS)
    group.add_argument("--config", metavar="FILE.yaml", help="settings, reward models and adapters")
    add_flags(group, ENGINE_SETTINGS)


def add_prompt_arguments(parser: argparse.ArgumentParser, *, samples: int, picture: str) -> None:
    """Add the flags of a command that draws answers to the prompts of a file and writes a folder with a picture."""
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE", help='.jsonl or .jsonl.gz of {"messages": [...]} or {"prompt": ""}')
    add("-m", "--samples", type=int, default=samples, metavar="M", help=f"answers drawn for each prompt ({samples})")
    add("--max-tokens", type=int, default=64, help="maximum number of tokens in an answer (64)")
    add("--temperature", type=float, default=1.0, help="sampling temperature (1)")
    add("--seed", type=int, default=0, help="seed of the answers and of the bootstrap (0)")
    add("--limit", type=int, metavar="N", help="use only the first N prompts")
    add("--out", required=True, metavar="FOLDER", help=f"folder for report.json and {picture}, new or empty")


def report_on_prompts(
    args: argparse.Namespace,
    out: Path,
    rewards: Sequence[NamedReward],
    ours: Collection[str],
    measure: "Measure",
    write: Callable[[Path, dict[str, object]], str],
) -> int:
    """Measure the served model's answers to --prompts and write the report into `out`; return the exit status.

    `measure` returns the metrics of the report; `write` adds its files to the folder and returns the text to print.
    `ours` names the command's own arguments that tell one run from another, beside those of `add_prompt_arguments`.
    Raises GuiderailError.
    """
    from guiderail.guides.core.types import SamplingSpec
    from guiderail.server.offline.offline_state import run_offline
    from guiderail.server.offline.prompt_file import read_prompts

    settings = settings_for(args, rewards)
    file = read_prompts(Path(args.prompts))
    prompts = file.prompts[: args.limit]
    if len(prompts) < 2:
        raise GuiderailError(f"--prompts {args.prompts}: at least 2 prompts are needed for an interval")
    sampling = SamplingSpec(args.max_tokens, args.temperature, seed=args.seed)
    kept = (*ours, "samples", "max_tokens", "temperature", "seed", "limit")
    with journal_of(out, settings, ours=kept, args=args, data=file.sha256) as journal:

        async def main(state: "ServerState") -> int:
            pin_weights(journal, state)
            metrics = await measure(state, prompts, sampling, journal)
            report = {
                "created": datetime.now(UTC).date().isoformat(),
                "model": settings.model_name,
                "prompts": describe_prompts(args, file, len(prompts), journal),
                "sampling": {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed},
                **metrics,
                "failed": journal.failed,
            }
            with whole_folder(out) as folder:
                write_report(folder, report)
                text = write(folder, report)
            journal.finish()
            print(text)
            print(out)
            return 0

        return run_offline(settings, main)


def parse_reward(text: str, label: str | None = None) -> NamedReward:
    """Parse a reward written as REWARD_HELP says; `label` names its values. Raises GuiderailError."""
    model = None
    if text.lstrip().startswith("{"):
        try:
            read = read_body(text.encode(errors="surrogateescape"))
        except JsonFault as error:
            raise GuiderailError(f"'{text}' {error}") from None
        spec: dict[str, object] = read if isinstance(read, dict) else {}
        if not isinstance(spec.get("name"), str):
            raise GuiderailError(f"'{text}' names no reward: \"name\" is missing")
        for field in ("weight", "transform"):
            if field in spec:
                raise GuiderailError(f"'{text}': \"{field}\" cannot be used here, where raw values are compared")
    elif "=" in text:
        from guiderail.server.rewards.models.reward_spec import parse_flag

        name, model = parse_flag(text)
        spec = {"name": name}
    else:
        spec = {"name": text}
    return NamedReward({**spec, "label": label} if label else spec, model)


def settings_for(args: argparse.Namespace, rewards: Sequence[NamedReward]) -> "Settings":
    """Settings from flags, environment and --config, with these rewards only. Raises GuiderailError."""
    from guiderail.server.serve_flags import given
    from guiderail.server.settings import load

    config = getattr(args, "config", None)
    models: dict[str, object] = dict(load(given(args, ENGINE_SETTINGS), config).reward)
    by_path: dict[str, dict[str, str]] = {}
    for reward in rewards:
        name = reward.name
        if reward.model is not None and by_path.setdefault(name, reward.model) != reward.model:
            raise GuiderailError(f"'{name}' names two models; give each a name of its own")
    models |= by_path
    asked = list(dict.fromkeys(reward.name for reward in rewards))
    only = {
        "guides": ["sampling"],
        "rewards": [name for name in asked if name not in models],
        "reward": {name: models[name] for name in asked if name in models},
        "alignment": {}, "profiles": {}, "limits": {}, "calibration": [],
    }  # fmt: skip
    return load(given(args, ENGINE_SETTINGS) | only, config)


def terms_of(state: "ServerState", rewards: Sequence[NamedReward]) -> "tuple[RewardTerm, ...]":
    """The rewards with checked parameters. Raises GuiderailError."""
    from guiderail.server.openai_errors import ApiError
    from guiderail.server.requests.specs import read_name, read_rewards

    try:
        return state.resolver.pipeline(
            read_rewards([reward.spec for reward in rewards], "rewards"), read_name("sum", "combine"), 1
        )[0]
    except ApiError as error:
        raise GuiderailError(str(error)) from error


def describe_prompts(args: argparse.Namespace, file: "PromptFile", given: int, journal: Journal) -> dict[str, object]:
    """Description of a report's prompts: those of the file, less those that failed."""
    left = given - len(journal.failed)
    return {"file": Path(args.prompts).name, "sha256": file.sha256, "prompts": left}


def describe_term(term: "RewardTerm") -> dict[str, object]:
    """Name and parameters of a reward, for a report."""
    return {"name": term.name, **term.params.model_dump(mode="json", by_alias=True)}


def journal_of(
    out: Path, settings: "Settings", *, ours: Collection[str], args: argparse.Namespace, data: str
) -> Journal:
    """The journal of a command that makes `out`. Raises JournalError.

    A run is identified by the arguments named in `ours`, the SHA-256 of its data, and the settings of the served model.
    """
    from guiderail.server.announce import say

    served = settings.model_dump(mode="json", exclude={"host", "port", "api_key", "drain_timeout_s", "cache_dir"})
    return Journal(beside(out), {"data": data, **{name: getattr(args, name) for name in ours}, "served": served}, say)


def pin_weights(journal: Journal, state: "ServerState") -> None:
    """Add the weights of the served model and of the rewards to the run's identity, once they are loaded.

    Raises JournalError if the journal was made with other weights.
    """
    from guiderail.server.models import catalogue
    from guiderail.server.models.model_fingerprint import fingerprint

    settings = state.settings
    rewards = {name: reward.revision() for name, reward in state.rewards.items()}
    journal.pin(model_revision=fingerprint(catalogue.resolve(settings.model, settings.cache)), rewards=rewards)


def output_folder(path: str) -> Path:
    """The folder of --out, which must be new or empty; `whole_folder` makes it. Raises GuiderailError."""
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GuiderailError(f"--out {path}: already exists and is not an empty folder")
    return out


def write_report(out: Path, report: dict[str, object]) -> None:
    """Write report.json into the folder, creating the folder if needed. NaN becomes null."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(_plain(report), indent=2, allow_nan=False) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and value != value else value
