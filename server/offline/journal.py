"""Journal of a long command: its finished items, kept on disk as it goes, so that the same command can resume.

A file of JSON lines beside the command's output: first the identity of the run (its arguments, data and weights),
then one line for each finished item. A line that was being written when the process died is dropped.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from guiderail.guides.core.errors import GuiderailError

FEW_FAILURES = 8  # a run tolerates this many, even if nothing has succeeded yet


class JournalError(GuiderailError):
    """The journal belongs to another run, or another process is using it."""


class Journal:
    """The finished items of a run by key; values are whatever JSON holds. Use it as a context manager.

    Failed items are remembered in `failed` (name of the item -> cause) and not on disk: the next run tries them again.
    """

    def __init__(
        self, path: Path | None = None, run: Mapping[str, Any] | None = None, say: Callable[[str], None] | None = None
    ) -> None:
        """Open `path`, which is created with the first item; None keeps nothing. `run` is the identity of the run.

        Raises JournalError, naming what differs, if the file is of another run.
        """
        self.path = path
        self.failed: dict[str, str] = {}
        self._run: dict[str, Any] = _plain({"guiderail": version("guiderail"), **(run or {})})
        self._say = say or (lambda text: None)
        self._items: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        self._before: dict[str, Any] | None = None
        self.resumed = False  # True if there were finished items
        if path is not None and path.exists():
            self._open(path)
            self._before = self._read(path)
            self._compare()
            self.resumed = bool(self._items)
            if self.resumed:
                self._say(f"resuming from {len(self._items)} finished items in {path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            if self._items:
                self._say(f"{len(self._items)} finished items are kept in {self.path}: run the same command to resume")

    @property
    def run(self) -> Mapping[str, Any]:
        """The identity of the run, as JSON holds it."""
        return self._run

    def pin(self, **facts: object) -> None:
        """Add facts that are known later to the run's identity, before the first item. Raises JournalError."""
        self._run |= _plain(facts)
        self._compare()

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def keep(self, key: str, value: object) -> None:
        """Keep a finished item."""
        if self.path is not None:
            if self._file is None:
                self._open(self.path)
            if self._before is None:
                self._write(self._run)
                self._before = self._run
            self._write([key, value])
        self._items[key] = value

    def fail(self, item: str, error: Exception) -> None:
        """Report and remember that an item failed. Raises `error` if more items fail than succeed."""
        if item not in self.failed:
            self._say(f"{item} is left out: {error}")
            self.failed[item] = str(error)
        if len(self.failed) > max(FEW_FAILURES, len(self._items)):
            raise error

    def finish(self) -> None:
        """Delete the file, once the run's result is written."""
        if self._file is not None:
            assert self.path is not None
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise JournalError(f"{path}: another process is running this command") from None

    def _read(self, path: Path) -> dict[str, Any] | None:
        """Load the complete lines, cut off what follows them, and return the first (None if there is none)."""
        assert self._file is not None
        self._file.seek(0)
        first, end = None, 0
        for line in self._file:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if isinstance(value, dict) and "guiderail" in value and first is None:
                first = value
            elif isinstance(value, list) and len(value) == 2 and first is not None:
                self._items[value[0]] = value[1]
            elif end == 0 and line.endswith(b"\n"):
                self._file.close()
                raise JournalError(f"{path}: not the journal of a command; move it away")
            else:
                break
            end += len(line)
        self._file.truncate(end)
        return first

    def _write(self, value: object) -> None:
        assert self._file is not None
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()

    def _compare(self) -> None:
        for name, ours in self._run.items():
            if self._before is not None and self._before.get(name) != ours:
                raise JournalError(
                    f"{self.path} belongs to a run with another {name} ({_short(self._before.get(name))}, now "
                    f"{_short(ours)}): use the same arguments, choose another --out, or delete the file to start again"
                )


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def beside(out: Path) -> Path:
    """The journal of a command that writes `out`."""
    return out.with_name(f"{out.name}.progress.jsonl")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Folder to write into, renamed to `out` (absent or empty) at the end: `out` is complete or absent."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    yield scratch
    os.replace(scratch, out)  # replaces an empty folder of this name
