"""The state of a fine-tuning after its last whole epoch, kept on disk so that it can go on from there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """One file, complete or absent. It belongs to a run: what another run left behind is not used."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """`run`: what tells the run apart, as JSON holds it."""
        self._path = path
        self._run = json.dumps(run, sort_keys=True)

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None. Loading runs no code of the file's."""
        if not self._path.exists():
            return None
        saved: dict[str, Any] = torch.load(self._path, weights_only=True)
        return saved["state"] if saved["run"] == self._run else None

    def save(self, state: dict[str, Any]) -> None:
        """Replaces what was saved before."""
        scratch = self._path.with_name(f"{self._path.name}.partial")
        torch.save({"run": self._run, "state": state}, scratch)
        scratch.replace(self._path)

    def delete(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)
