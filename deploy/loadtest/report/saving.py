"""Where results are saved: checked before anything is sent, and written so that a file is whole or as it was before."""

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from guiderail.loadtest.load.runner import Run
from guiderail.loadtest.loadtest_error import LoadtestError
from guiderail.loadtest.report.result import Reporting

ROOM = 2**20  # bytes that a folder must take before a run; a result is about a tenth of that
LONGEST = 80  # characters of a label or model in a file's name, most of which take 255 bytes


def prepare(directory: str | None, filename: str | None) -> None:
    """Make the folder that results go to, and write into it. Raises LoadtestError if that does not work."""
    named = _folder(directory) / (filename or "")
    if filename and (named.is_dir() or filename.endswith(os.sep)):
        raise LoadtestError(f"--result-filename {filename}: this is a folder")
    if filename and named.exists() and not named.is_file():  # such as /dev/stdout
        return
    folder = named.parent if filename else named
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * ROOM)
            probe.flush()
            os.fsync(probe.fileno())
        if named.is_file():
            named.open("ab").close()
    except OSError as error:
        flag = f"--result-filename {filename}" if filename else f"--result-dir {directory or '.'}"
        raise LoadtestError(f"{flag}: results cannot be saved there: {error}") from error


def result_path(directory: str | None, filename: str | None, about: Reporting, result: dict[str, Any]) -> Path:
    """Path of the JSON, named as vLLM does unless `filename` is given; a made-up name is one that is not taken yet."""
    if filename:
        return _folder(directory) / filename
    cap = result.get("max_concurrency")
    if result["kind"] == "sweep":
        load = "sweep"
    elif "ramp_up_strategy" in result:
        start, end = result["ramp_up_start_rps"], result["ramp_up_end_rps"]
        load = f"ramp-up-{result['ramp_up_strategy']}-{start:g}qps-{end:g}qps"
    else:
        load = f"{result['request_rate']}qps"
    label, model = (text[:LONGEST] for text in (about.label.replace(os.sep, "-"), about.model.rpartition("/")[2]))
    name = f"{label}-{load}{f'-concurrency{cap}' if cap else ''}-{model}-{result['date']}"
    path, number = _folder(directory) / f"{name}.json", 2
    while any(beside(path, suffix).exists() for suffix in (".json", ".requests.jsonl", ".html")):
        path, number = path.with_name(f"{name}-{number}.json"), number + 1
    return path


def beside(path: Path, suffix: str) -> Path:
    """The path with this suffix in place of .json. A dot in the name is no suffix."""
    return path.with_name(path.name.removesuffix(".json") + suffix)


def json_text(result: dict[str, Any]) -> str:
    """A result as text."""
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def requests_text(runs: Sequence[Run]) -> str:
    """A line of JSON for every request of every run; `stage` counts the runs from 0."""
    rows = ({"stage": stage, **record.row(run.start)} for stage, run in enumerate(runs) for record in run.records)
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def save(path: Path, text: str) -> Path:
    """Write a file and return its path, which is one in the folder for temporary files if `path` cannot be written.

    Raises LoadtestError if neither can.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, text)
        return path
    except OSError as error:
        spare = Path(tempfile.gettempdir()) / f"{os.getpid()}-{path.name}"
        with suppress(OSError):
            _write(spare, text)
            return spare
        raise LoadtestError(f"{path} cannot be written: {error}") from error


def _write(path: Path, text: str) -> None:
    data = text.encode(errors="replace")
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_bytes(data)
        return
    scratch = path.with_name(f".{path.name[:LONGEST]}.{os.getpid()}.partial")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _folder(directory: str | None) -> Path:
    return Path(directory or ".").expanduser()
