"""Tritons of other versions than the installed one, each in a folder of its own, and what our kernels become in them.

A folder holds Triton alone and stands first on PYTHONPATH; torch and all else come from the environment at hand.
Folders and results are kept in .pytest_cache, so that only the first run takes minutes.
"""

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".pytest_cache" / "triton"
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")  # of torch 2.11, of torch 2.13 with CUDA, and of the CPU set-up's lock
CAPABILITIES = (80, 90, 100)


class NoTriton(Exception):
    """This version cannot be had here; says why."""


def folder(wanted: str) -> Path | None:
    """Where this version of Triton lies, installed if need be; None for the environment's own. Raises NoTriton."""
    try:
        if version("triton") == wanted:
            return None
    except PackageNotFoundError:
        pass
    target = KEPT / wanted
    if not (target / "triton").is_dir():
        KEPT.mkdir(parents=True, exist_ok=True)
        part = KEPT / f"{wanted}.{os.getpid()}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--target", str(part), f"triton=={wanted}"]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            said = made.stderr.strip().splitlines() or ["pip failed"]
            raise NoTriton(f"triton {wanted} cannot be installed here: {said[-1]}")
        part.rename(target)
    return target


def kernels(wanted: str, capability: int) -> dict[str, Any]:
    """What kernel_variants.py reports under this Triton. Raises NoTriton."""
    where = folder(wanted)
    sources = [*sorted((ROOT / "kernels").glob("*.py")), ROOT / "tests" / "support" / "kernel_variants.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    kept = KEPT / f"{wanted}-{capability}-{digest}.json"
    if not kept.exists():
        first = [] if where is None else [str(where)]
        path = os.pathsep.join([*first, str(ROOT / ".types"), str(ROOT / "tests" / "support")])
        environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(KEPT / "compiled" / wanted)}
        command = [sys.executable, "-P", str(ROOT / "tests" / "support" / "kernel_variants.py"), str(capability)]
        made = subprocess.run(command, capture_output=True, text=True, env=environment)
        if made.returncode:
            raise RuntimeError(f"triton {wanted}, sm_{capability}: {made.stderr[-2000:]}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(made.stdout)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found
