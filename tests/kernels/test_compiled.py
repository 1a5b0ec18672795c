"""Every kernel compiles for A100 and H100 in the Triton of torch 2.13 without a GPU, and spills nothing.

The first run installs the Tritons that are not there (about 200 MB each) and compiles for minutes; see tritons.py.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from kernel_variants import SHARED_MEMORY
from tritons import NoTriton, kernels

CASES = [("3.7.1", 80), ("3.7.1", 90)]  # torch 2.13's; `make bench-kernels-compile` tries all of tritons.VERSIONS
FLOAT32 = "float32"  # sums of products without tensor cores: more registers than there are


@pytest.fixture(scope="module")
def found() -> Any:
    """Reports by version and capability, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(kernels, *case) for case in CASES}


def report(found: dict[tuple[str, int], "Future[dict[str, Any]]"], version: str, capability: int) -> dict[str, Any]:
    try:
        return found[version, capability].result()
    except NoTriton as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("version", "capability"), CASES)
def test_every_kernel_compiles_and_spills_nothing(found: Any, version: str, capability: int) -> None:
    variants = report(found, version, capability)
    assert {name: each["error"] for name, each in variants.items() if "error" in each} == {}
    assert {name: each["spilled"] for name, each in variants.items() if each["spilled"] and FLOAT32 not in name} == {}
    assert {n: each["shared"] for n, each in variants.items() if each["shared"] > SHARED_MEMORY[capability]} == {}
    plain = [name for name in variants if name.startswith("attention") and FLOAT32 not in name]
    assert [sum(f"heads of {dim}" in name for name in plain) for dim in (64, 128, 256)] == [4, 4, 4]
