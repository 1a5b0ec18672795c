"""Stored calibration: raw values of one reward under one model, by prompt, in a safetensors file.

Tensors: keys uint8 [P, 32], the SHA-256 of each prompt; values float32 [P, n]. The metadata names model, reward,
their revisions, the reward's parameters, how the answers were sampled (`conditions`), and the date. A file that does
not fit the served model or reward is refused, and not used for a request that samples otherwise: quantiles of another
policy would be wrong without looking wrong.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.errors import GuiderailError
from guiderail.guides.core.types import SamplingSpec, TokenPrompt
from guiderail.guides.prompters import Template

FORMAT, VERSION = "guiderail-calibration", "1"
FREE = ("seed", "stream", "logprobs", "priority")  # fields of a SamplingSpec that change no answer's distribution
POOLED = 4096  # values kept of the pool over all prompts: quantiles to better than 0.1 %


class CalibrationError(GuiderailError):
    """A stored calibration cannot be read or does not fit."""


@dataclass(frozen=True, slots=True)
class StoredCalibration:
    """One file's content. `params` is the params_key of the reward's parameters."""

    reward: str
    params: str
    metadata: Mapping[str, str]
    values: Mapping[str, tuple[float, ...]]
    pooled: tuple[float, ...]

    def unlike(self, dialogue: Dialogue) -> list[str]:
        """Differences between the answers of this file and those that calibrate a dialogue's rewards."""
        theirs = {**conditions(SamplingSpec(0), Template().dump()), **json.loads(self.metadata["sampling"])}
        ours = conditions(dialogue.sampling, dialogue.prompter.dump())
        found = [
            f"{name} is {ours[name]!r} here and {theirs[name]!r} there" for name in ours if ours[name] != theirs[name]
        ]
        if dialogue.told:
            found.append("its policies are told more here")
        if dialogue.prompt.adapter is not None or dialogue.prompt.mix:
            found.append("it is of the served model alone")
        return found


def conditions(sampling: SamplingSpec, prompter: Mapping[str, Any]) -> dict[str, Any]:
    """All that the values of an answer depend on besides model and prompt, as JSON values."""
    fields = {name: value for name, value in asdict(sampling).items() if name not in FREE}
    loaded: dict[str, Any] = json.loads(json.dumps({**fields, "prompter": dict(prompter)}))
    return loaded


def prompt_key(prompt: TokenPrompt) -> str:
    """Key of a prompt: its token ids and adapter, hashed."""
    return hashlib.sha256(json.dumps([prompt.adapter, prompt.token_ids]).encode()).hexdigest()


def params_key(params: Any) -> str:
    """A reward's parameters as canonical JSON."""
    body = params.model_dump(mode="json", by_alias=True) if isinstance(params, BaseModel) else {}
    return json.dumps(body, sort_keys=True)


def save(
    path: Path,
    values: Mapping[str, Sequence[float]],
    *,
    model: str,
    model_revision: str,
    reward: str,
    reward_revision: str,
    params: str,
    sampling: Mapping[str, Any],
) -> None:
    """Writes a file, which is complete or absent: the values of each prompt by prompt_key, equally many for each."""
    keys = np.array([list(bytes.fromhex(key)) for key in values], dtype=np.uint8)
    table = np.array([list(row) for row in values.values()], dtype=np.float32)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "model_revision": model_revision,
        "reward": reward,
        "reward_revision": reward_revision,
        "params": params,
        "sampling": json.dumps(sampling, sort_keys=True),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    scratch = path.with_name(f".{path.name}.partial")
    save_file({"keys": keys, "values": table}, scratch, metadata=metadata)
    scratch.replace(path)


def load(path: Path) -> StoredCalibration:
    """Reads a file. Raises CalibrationError if it is not one."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
                raise CalibrationError(f"{path} is no {FORMAT} file of version {VERSION}")
            keys, table = file.get_tensor("keys"), file.get_tensor("values")
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path}: {error}") from error
    if keys.ndim != 2 or keys.shape[1] != 32 or table.ndim != 2 or len(keys) != len(table) or table.shape[1] < 2:
        raise CalibrationError(f"{path}: keys {keys.shape} and values {table.shape} do not fit")
    if not np.isfinite(table).all():
        raise CalibrationError(f"{path}: has values that are not finite")
    pooled = np.sort(table.ravel().astype(np.float64))
    if len(pooled) > POOLED:
        pooled = pooled[((np.arange(POOLED) + 0.5) * len(pooled) / POOLED).astype(np.int64)]
    values = {bytes(key).hex(): tuple(map(float, row)) for key, row in zip(keys, table, strict=True)}
    return StoredCalibration(metadata["reward"], metadata["params"], metadata, values, tuple(map(float, pooled)))


def check(stored: StoredCalibration, path: Path, model_revision: str, reward_revision: str | None) -> None:
    """Refuses a file made with another model or reward. Raises CalibrationError that says what differs.

    reward_revision: None if no such reward is served.
    """
    if reward_revision is None:
        raise CalibrationError(f"{path} calibrates reward '{stored.reward}', which is not served")
    for what, theirs, ours in (
        ("model", stored.metadata["model_revision"], model_revision),
        (f"reward '{stored.reward}'", stored.metadata["reward_revision"], reward_revision),
    ):
        if theirs != ours:
            raise CalibrationError(
                f"{path} was made {stored.metadata['date']} with another {what} (revision {theirs}, served is {ours}); "
                "make it again with `guiderail rewards calibrate`"
            )
