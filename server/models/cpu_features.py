"""Instruction set of the processor, and the dtype that `auto` stands for on it: the only module that decides either.

Decided by what the processor has and the environment lets it use, never by timing: a restart must not change
answers. A layer of 576 x 1,536 at 512 tokens (2 cores) took 3.5 ms in float32 and 5.0 in bfloat16 with avx512_bf16,
3.0 and 14.6 with plain AVX-512, where oneDNN emulates bfloat16. Only matrix tiles (amx_bf16) make bfloat16 the faster.
"""

import os
import platform

BFLOAT16_IS_FASTER = frozenset({"amx_bf16"})
# Each includes those before it. "x86-64" stands for processors without AVX2.
X86 = ("x86-64", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def instruction_set() -> str:
    """Return the widest instruction set for matrix products: one of X86, or another architecture's name.

    ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY limit oneDNN and torch, and so they limit this.
    """
    import torch

    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return "aarch64" if machine == "arm64" else machine
    has = torch.cpu.get_capabilities()
    steps = (
        torch.cpu._is_avx2_supported(),
        torch.cpu._is_avx512_supported(),
        torch.cpu._is_avx512_bf16_supported() and _onednn_has_bfloat16(),
        torch.cpu._is_amx_tile_supported() and has.get("amx_bf16", False),
    )
    widest = next((index for index, there in enumerate(steps) if not there), len(steps))
    return X86[min(widest, _environments_limit())]


def auto_dtype() -> str:
    """Return the dtype that `auto` stands for on this processor, "bfloat16" or "float32"; GPUs have their own rule."""
    return "bfloat16" if instruction_set() in BFLOAT16_IS_FASTER else "float32"


def packs_bfloat16() -> bool:
    """Return True if oneDNN takes bfloat16 weights in its packed layout here: it refuses below AVX-512."""
    held_below_avx512 = _environments_limit() < X86.index("avx512")
    return _onednn_has_bfloat16() and not held_below_avx512


def description() -> str:
    """Return the processor's name and instruction set, as in "AMD EPYC (avx2)"."""
    import torch

    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{name} ({instruction_set()})"


def report() -> str:
    """Return one line for the start: the processor, and what `auto` is on it. Imports torch."""
    return f"processor {description()}: dtype auto is {auto_dtype()} on it"


def _onednn_has_bfloat16() -> bool:
    """Return True if oneDNN computes in bfloat16 at all. On any AVX-512 it does, which does not make it fast."""
    import torch

    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _environments_limit() -> int:
    """Return the index into X86 of the widest instruction set that the environment allows.

    oneDNN reads ONEDNN_MAX_CPU_ISA, or else DNNL_MAX_CPU_ISA, in any case (AVX2_VNNI, AVX512_CORE_AMX_FP16, ...);
    torch reads ATEN_CPU_CAPABILITY (default, avx2, avx512). Both ignore values that they do not know, and so does this.
    """
    aten = {"default": 0, "avx2": 1, "avx512": len(X86) - 1}.get(os.environ.get("ATEN_CPU_CAPABILITY", ""))
    name = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    onednn = None
    if name in ("SSE41", "AVX"):
        onednn = 0
    elif name.startswith("AVX2"):
        onednn = 1
    elif name in ("AVX512_CORE", "AVX512_CORE_VNNI"):
        onednn = 2
    elif "AMX" not in name and name.startswith(("AVX512_CORE_", "AVX10")):
        onednn = 3
    return min(limit for limit in (aten, onednn, len(X86) - 1) if limit is not None)
