"""Checkpoint of a fine-tuning after its last complete epoch, kept on disk so that it can resume."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """One file, complete or absent. It belongs to one run: a file of another run is ignored."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """`run` is the identity of the run, as JSON holds it."""
        self._path = path
        self._run = json.dumps(run, sort_keys=True)

    def load(self) -> dict[str, Any] | None:
        """The state saved last, or None. Loading runs no code from the file."""
        if not self._path.exists():
            return None
        saved: dict[str, Any] = torch.load(self._path, weights_only=True)
        return saved["state"] if saved["run"] == self._run else None

    def save(self, state: dict[str, Any]) -> None:
        """Save a state in place of the last one."""
        scratch = self._path.with_name(f"{self._path.name}.partial")
        torch.save({"run": self._run, "state": state}, scratch)
        scratch.replace(self._path)

    def delete(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
