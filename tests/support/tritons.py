"""Tritons of other versions than the installed one, each in a folder of its own, and what our kernels become in them.

A folder holds Triton alone and stands first on PYTHONPATH; torch and all else come from the environment at hand.
Folders, compiled kernels and results by the sources' hash are kept in .pytest_cache, so that only the first run takes
minutes.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".pytest_cache" / "triton"
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")  # of torch 2.11, of torch 2.13 with CUDA, and of the CPU set-up's lock
CAPABILITIES = (80, 90, 100)
AT_A_TIME = 2  # compilations; each takes a core and about 1 GB


class NoTriton(Exception):
    """This version cannot be had here; says why."""


def folder(wanted: str) -> Path | None:
    """Where this version of Triton lies, installed if need be; None for the environment's own. Raises NoTriton."""
    try:
        if version("triton") == wanted:
            return None
    except PackageNotFoundError:
        pass
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{wanted}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the cards of a version ask at once
        if wanted in _missing:
            raise NoTriton(_missing[wanted])
        target = KEPT / wanted
        if not (target / "triton").is_dir():
            try:
                _install(wanted, target)
            except NoTriton as reason:
                _missing[wanted] = str(reason)
                raise
    return target


_missing: dict[str, str] = {}  # reasons by version, so that pip tries once in a process


def _install(wanted: str, target: Path) -> None:
    part = target.with_name(f"{wanted}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an installation that was cut off
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--retries", "1", "--only-binary", ":all:", "--target", str(part), f"triton=={wanted}"]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        said = made.stderr.strip().splitlines() or ["pip failed"]
        raise NoTriton(f"triton {wanted} cannot be installed here: {said[-1]}")
    part.rename(target)


def reports(cases: Iterable[tuple[str, int]], every: bool = False) -> dict[tuple[str, int], "Future[dict[str, Any]]"]:
    """Results of `kernels`, or what it raises, by version and capability; AT_A_TIME run in the background."""
    pool = ThreadPoolExecutor(AT_A_TIME)
    found = {case: pool.submit(kernels, *case, every=every) for case in cases}
    pool.shutdown(wait=False)
    return found


def kernels(wanted: str, capability: int, every: bool = False) -> dict[str, Any]:
    """Report of kernel_variants.py under this Triton, of the usual variants or of every one.

    Raises NoTriton, and RuntimeError where the program itself fails.
    """
    where = folder(wanted)
    sources = [*sorted((ROOT / "kernels").glob("*.py")), ROOT / "tests" / "support" / "kernel_variants.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    kept = KEPT / f"{wanted}-{capability}-{'every' if every else 'usual'}-{digest}.json"
    if not kept.exists():
        first = [] if where is None else [str(where)]
        path = os.pathsep.join([*first, str(ROOT / ".types"), str(ROOT / "tests" / "support")])
        environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(KEPT / "compiled" / wanted)}
        command = [sys.executable, "-P", str(ROOT / "tests" / "support" / "kernel_variants.py"), str(capability)]
        command += ["--every"] if every else []
        made = subprocess.run(command, capture_output=True, text=True, env=environment)
        if made.returncode:
            raise RuntimeError(f"triton {wanted}, sm_{capability}: {made.stderr[-2000:]}")
        KEPT.mkdir(parents=True, exist_ok=True)
        kept.write_text(made.stdout)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found
