"""Install torch and a lock file into the Python that runs it, a few packages at a time, and say how far it is.

`make setup` runs it in .venv. Packages already there in the wanted version are skipped, so that an interrupted
run resumes where it stopped. pip's warnings are hidden; if it fails, its whole output is shown. Needs nothing but pip.
"""

import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

TORCH = "torch==2.13.0"  # by itself: a CPU build where one is offered, else the default one with its own dependencies
AT_ONCE = 12  # packages in one call of pip, which takes seconds to start
NO_TORCH = """guiderail: pip found no torch 2.13.0 for this Python: configure an index or a folder that offers it
(pip config set global.extra-index-url URL, or PIP_FIND_LINKS=FOLDER), then run make again."""


def normal(name: str) -> str:
    """Name of a distribution as package indexes compare it."""
    return name.lower().replace("_", "-").replace(".", "-")


def missing(wanted: list[str]) -> list[str]:
    """The pins (NAME==VERSION) that are not installed. A build's own suffix (+cpu) does not count."""
    there = {normal(each.name): each.version.partition("+")[0] for each in distributions()}
    return [pin for pin in wanted if there.get(normal(pin.partition("==")[0])) != pin.partition("==")[2]]


def pip(*arguments: str) -> int:
    """Run `pip install` and return its status. Shows large downloads as they begin, and all output on failure."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    said = []
    with subprocess.Popen(command, stdout=-1, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if line.strip().startswith("Downloading") and " MB)" in line:
                print("     ", line.strip(), file=sys.stderr, flush=True)
    if process.returncode:
        print(*said, sep="", file=sys.stderr)
    return process.returncode


def main(lock: str) -> int:
    """Install what is missing; return the exit status."""
    lines = (line.strip() for line in Path(lock).read_text().splitlines())
    pins = [line for line in lines if line and not line.startswith("#")]
    began, total = time.monotonic(), len(pins) + 1
    rest = missing(pins)
    groups = [rest[start : start + AT_ONCE] for start in range(0, len(rest), AT_ONCE)]
    done = total - len(rest)

    def tell(names: str, count: int) -> None:
        seconds = time.monotonic() - began
        print(f"[{count:3} of {total} packages, {seconds:3.0f} s] {names}", file=sys.stderr, flush=True)

    if missing([TORCH]):
        done -= 1
        tell("torch", done)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("".join(f"{pin}\n" for pin in pins if not pin.startswith("triton==")))
            constraints.flush()
            if status := pip("--constraint", constraints.name, TORCH):
                print(NO_TORCH, file=sys.stderr)
                return status
        done += 1
    for group in groups:
        group = missing(group)  # torch brought some
        if group:
            tell(", ".join(pin.partition("==")[0] for pin in group), done)
            if status := pip("--no-deps", *group):
                return status
        done = total - len(missing(pins))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
