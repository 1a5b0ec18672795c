"""Registers and spills of every kernel, by card and Triton, without a GPU: `make bench-kernels-compile`."""

import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from report import write_section
from tritons import CAPABILITIES, VERSIONS, NoTriton, reports


def cell(found: dict[str, Any]) -> str:
    """Registers, with the spilled bytes where there are any."""
    if "error" in found:
        return "does not compile"
    return f"{found['registers']}" + (f" + {found['spilled']} B" if found["spilled"] else "")


def main() -> None:
    """Compile for every card with every available Triton, and write the section."""
    found = reports(itertools.product(VERSIONS, CAPABILITIES), every=True)
    made: dict[tuple[str, int], dict[str, Any]] = {}
    missing: dict[str, None] = {}
    for case, report in found.items():
        try:
            made[case] = report.result()
        except NoTriton as reason:
            missing[f"{reason}."] = None
    names = list(dict.fromkeys(name for each in made.values() for name in each))
    lines = [
        "Registers of a thread (at most 255), and bytes that are spilled. bfloat16 unless stated "
        "otherwise; one variant of attention serves every number of query and KV heads, because a tile holds queries times heads "
        "(to 128 lanes, 64 for heads of 256). float32 has no tensor cores and spills. Nothing here was timed.",
        *missing, "",
        "| kernel | " + " | ".join(f"{version}, sm_{each}" for version, each in made) + " |",
        "|---|" + "---|" * len(made),
        *(f"| {name} | " + " | ".join(cell(each[name]) for each in made.values()) + " |" for name in names),
    ]  # fmt: skip
    data = {f"{version} sm_{each}": variants for (version, each), variants in made.items()}
    write_section("kernels_compile", "Kernels: registers and spills", "make bench-kernels-compile", lines, data)


if __name__ == "__main__":
    main()
