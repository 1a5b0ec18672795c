"""What the offline commands share: flags of the served model, rewards named on the command line, the output folder.

Imports nothing heavy at its top: the command line imports it for the arguments.
"""

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.offline.journal import Journal, beside

if TYPE_CHECKING:
    from guiderail.guides.scoring import RewardTerm
    from guiderail.server.offline.prompt_file import PromptFile
    from guiderail.server.settings import Settings
    from guiderail.server.state import ServerState

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
    """A reward of the command line: as the alignment object writes it, and its model if one was given by path."""

    spec: dict[str, Any]
    model: dict[str, str] | None = None


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config and those flags of `guiderail serve` that say which model is served and how."""
    from guiderail.server.serve_flags import add_flags

    group = parser.add_argument_group("the served model, as for `guiderail serve`", argument_default=argparse.SUPPRESS)
    group.add_argument("--config", metavar="FILE.yaml", help="settings, reward models and adapters")
    add_flags(group, ENGINE_SETTINGS)


def parse_reward(text: str, label: str | None = None) -> NamedReward:
    """Reads what REWARD_HELP says; `label` names its values. Raises GuiderailError."""
    model = None
    if text.lstrip().startswith("{"):
        try:
            spec = json.loads(text)
        except ValueError as error:
            raise GuiderailError(f"'{text}' is not JSON: {error}") from None
        if not isinstance(spec.get("name"), str):
            raise GuiderailError(f"'{text}' does not say which reward: \"name\" is missing")
        for field in ("weight", "transform"):
            if field in spec:
                raise GuiderailError(f"'{text}': \"{field}\" has no place here, where raw values are looked at")
    elif "=" in text:
        from guiderail.server.rewards.models.reward_spec import parse_flag

        name, model = parse_flag(text)
        spec = {"name": name}
    else:
        spec = {"name": text}
    return NamedReward({**spec, "label": label} if label else spec, model)


def settings_for(args: argparse.Namespace, rewards: Sequence[NamedReward]) -> "Settings":
    """Settings from flags, environment and --config, with no more than these rewards. Raises GuiderailError."""
    from guiderail.server.serve_flags import given
    from guiderail.server.settings import load

    config = getattr(args, "config", None)
    models: dict[str, Any] = dict(load(given(args, ENGINE_SETTINGS), config).reward)
    by_path: dict[str, dict[str, str]] = {}
    for reward in rewards:
        name = reward.spec["name"]
        if reward.model is not None and by_path.setdefault(name, reward.model) != reward.model:
            raise GuiderailError(f"'{name}' is given two models; give each a name of its own")
    models |= by_path
    asked = list(dict.fromkeys(reward.spec["name"] for reward in rewards))
    only = {
        "guides": ["sampling"],
        "rewards": [name for name in asked if name not in models],
        "reward": {name: models[name] for name in asked if name in models},
        "alignment": {}, "profiles": {}, "limits": {}, "calibration": [],
    }  # fmt: skip
    return load(given(args, ENGINE_SETTINGS) | only, config)


def terms_of(state: "ServerState", rewards: Sequence[NamedReward]) -> "tuple[RewardTerm, ...]":
    """The rewards, their parameters checked. Raises GuiderailError."""
    from guiderail.server.openai_errors import ApiError

    try:
        return state.resolver.pipeline([reward.spec for reward in rewards], "sum", 1)[0]
    except ApiError as error:
        raise GuiderailError(str(error)) from error


def describe_prompts(args: argparse.Namespace, file: "PromptFile", given: int, journal: Journal) -> dict[str, Any]:
    """Which prompts a report is about: those of the file but for those that failed."""
    left = given - len(journal.failed)
    return {"file": Path(args.prompts).name, "sha256": file.sha256, "prompts": left}


def describe_term(term: "RewardTerm") -> dict[str, Any]:
    """Name and parameters of a reward, for a report."""
    return {"name": term.name, **term.params.model_dump(mode="json", by_alias=True)}


def journal_of(
    out: Path, settings: "Settings", *, ours: Collection[str], args: argparse.Namespace, data: str
) -> Journal:
    """What a command keeps while it makes `out`, told apart by its own arguments (those named in `ours`), by the
    SHA-256 of its data and by how the model is served. Raises JournalError."""
    from guiderail.server.announce import say

    served = settings.model_dump(mode="json", exclude={"host", "port", "api_key", "drain_timeout_s", "cache_dir"})
    return Journal(beside(out), {"data": data, **{name: getattr(args, name) for name in ours}, "served": served}, say)


def pin_weights(journal: Journal, state: "ServerState") -> None:
    """Tells the run apart by the weights of the served model and of the rewards, once they are loaded. Raises
    JournalError if what is kept was made with others."""
    from guiderail.server.models import catalogue
    from guiderail.server.models.model_fingerprint import fingerprint

    settings = state.settings
    rewards = {name: reward.revision() for name, reward in state.rewards.items()}
    journal.pin(model_revision=fingerprint(catalogue.resolve(settings.model, settings.cache)), rewards=rewards)


def output_folder(path: str) -> Path:
    """The folder of --out, which must be new or empty; whole_folder makes it. Raises GuiderailError."""
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GuiderailError(f"--out {path}: exists and is not an empty folder")
    return out


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Writes report.json into the folder, which is made if it is not there. NaN becomes null."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(_plain(report), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and value != value else value
