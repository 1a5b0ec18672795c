"""Holds a process to AVX2, and all that it starts: put this folder on PYTHONPATH, and Python imports it as it begins.

Two variables hold oneDNN and torch's own kernels, but nothing that asks torch.cpu what the processor has: by that vLLM
chooses which of its extensions to load and its attention. Those questions are asked in the server and again in every
process that vLLM starts, as they import; what reaches all of them before that is the environment alone, so neither a
fixture nor a conftest would do. torch is not imported here, but changed once something has.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any

BEYOND_AVX2 = ("avx512", "avx10", "avx_vnni", "avx_ne_convert", "amx")

os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"


class SaysNo:
    """A probe that says no and is in all else what it was: torch looks through its operations and their overloads."""

    def __init__(self, probe: Any) -> None:
        self._probe = probe

    def __call__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._probe, name)


def hold(torch: ModuleType) -> None:
    """Makes torch say of the processor that it ends at AVX2."""
    plain = torch.cpu.get_capabilities

    def capabilities() -> MappingProxyType[str, Any]:
        has = plain().items()
        return MappingProxyType({key: False if key.startswith(BEYOND_AVX2) else value for key, value in has})

    capabilities.__doc__ = plain.__doc__
    torch.cpu.get_capabilities = capabilities
    for probe in ("avx512", "avx512_bf16", "vnni", "amx_tile", "amx_fp16"):
        silence(torch.cpu, f"_is_{probe}_supported")
    for probe in ("bf16", "fp16"):
        silence(torch.ops.mkldnn, f"_is_mkldnn_{probe}_supported")


def silence(module: Any, probe: str) -> None:
    """Makes a probe say no. Raises AttributeError if torch has none of this name any more."""
    setattr(module, probe, SaysNo(getattr(module, probe)))


class HoldTorch:
    """Finds torch as usual and changes it once it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_hold(module: ModuleType) -> None:
                load(module)
                hold(module)

            spec.loader.exec_module = load_and_hold  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, HoldTorch())  # type: ignore[arg-type]
