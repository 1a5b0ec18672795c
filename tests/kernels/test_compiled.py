"""Every kernel compiles for A100, H100 and B200 in three Tritons without a GPU, and spills nothing.

The first run installs the Tritons that are not there (about 200 MB each) and compiles for minutes; see tritons.py. Here
are the usual variants of kernel_variants.py; `make bench-kernels-compile` has every one.
"""

import importlib
import itertools
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritons
from kernel_variants import SHARED_MEMORY, compiled, variants

import guiderail.kernels

CASES = list(itertools.product(tritons.VERSIONS, tritons.CAPABILITIES))


@pytest.fixture(scope="module")
def found() -> Iterator[Any]:
    """Reports by version and capability."""
    made = tritons.reports(CASES)
    yield made
    for each in made.values():
        each.cancel()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("version", "capability"), CASES)
def test_every_kernel_compiles_and_spills_nothing(found: Any, version: str, capability: int) -> None:
    try:
        report = found[version, capability].result()
    except tritons.NoTriton as reason:
        pytest.skip(str(reason))
    assert {name: each["error"] for name, each in report.items() if "error" in each} == {}
    assert {name: each["spilled"] for name, each in report.items() if each["spilled"]} == {}
    assert {name: each["shared"] for name, each in report.items() if each["shared"] > SHARED_MEMORY[capability]} == {}
    attention = [name for name in report if name.startswith("attention")]
    assert [sum(name.endswith(f"heads of {dim}") for name in attention) for dim in (64, 128, 256)] == [2, 2, 2]


def test_no_kernel_is_left_out() -> None:
    """A kernel is what is launched: its name ends in _kernel."""
    jit = pytest.importorskip("triton.runtime.jit").JITFunction
    names = [each.name for each in pkgutil.iter_modules(guiderail.kernels.__path__)]
    modules = [importlib.import_module(f"{guiderail.kernels.__name__}.{name}") for name in names]
    kernels = {
        name for module in modules for name, value in vars(module).items()
        if isinstance(value, jit) and name.endswith("_kernel")
    }  # fmt: skip
    assert {variant.kernel.__name__ for variant in variants(90, every=False).values()} == kernels
    assert len(kernels) >= 5


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_spills_are_seen() -> None:
    """The control: with too few registers the same kernel spills."""
    pytest.importorskip("triton")
    variant = variants(80, every=False)["attention to contexts, heads of 64"]
    assert compiled(variant._replace(options=variant.options | {"maxnreg": 64}), 80)["spilled"] > 0


def test_a_triton_that_cannot_be_had_is_a_reason_to_skip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tritons, "KEPT", tmp_path)
    monkeypatch.setattr(tritons, "_missing", {})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for _ in range(2):
        with pytest.raises(tritons.NoTriton, match=r"triton 2\.0\.0 cannot be installed here: .*triton==2\.0\.0"):
            tritons.folder("2.0.0")
    assert [path.name for path in tmp_path.iterdir()] == ["2.0.0.lock"]
