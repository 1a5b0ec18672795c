"""Which instruction set and dtype are chosen, on processors that this machine need not be."""

import platform
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from guiderail.server.engines.vllm.native_ops import native_ops
from guiderail.server.models import cpu_features
from guiderail.server.rewards.models.cpu_modules import PackedLinear, speed_up

AVX2 = {"avx", "avx2", "fma3"}
AVX512 = AVX2 | {"avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"}
BF16 = AVX512 | {"avx512_bf16"}
AMX = BF16 | {"amx_tile", "amx_bf16", "amx_int8"}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the processor: architecture, its capabilities, and the environment's limits."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)

    def be(machine: str, has: set[str], onednn: bool | None = None, **limits: str) -> None:
        """onednn: what oneDNN says of bfloat16; by default what torch's own probe does: yes from AVX-512 on."""
        says = onednn if onednn is not None else "avx512_bw" in has or "avx_ne_convert" in has
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Test", **dict.fromkeys(has, True)})
        for probe, needs in (
            ("avx2", "avx2"),
            ("avx512", "avx512_f"),
            ("avx512_bf16", "avx512_bf16"),
            ("amx_tile", "amx_tile"),
        ):
            monkeypatch.setattr(torch.cpu, f"_is_{probe}_supported", lambda needs=needs: needs in has)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: says)
        for name, value in limits.items():
            monkeypatch.setenv(name, value)

    return be


@pytest.mark.parametrize(
    ("machine", "has", "limits", "instructions", "dtype", "packs"),
    [
        ("x86_64", AMX, {}, "amx_bf16", "bfloat16", True),
        ("x86_64", AMX | {"avx512_fp16", "amx_fp16", "avx10_1"}, {}, "amx_bf16", "bfloat16", True),
        ("x86_64", BF16, {}, "avx512_bf16", "float32", True),
        ("x86_64", AVX512, {}, "avx512", "float32", True),
        ("x86_64", AVX2, {}, "avx2", "float32", False),
        ("x86_64", AVX2 | {"avx_vnni", "avx_ne_convert"}, {}, "avx2", "float32", True),
        ("x86_64", {"avx"}, {}, "x86-64", "float32", False),
        ("AMD64", AVX2, {}, "avx2", "float32", False),
        ("aarch64", {"neon", "bf16", "i8mm", "sve"}, {}, "aarch64", "float32", False),
        ("arm64", {"neon"}, {}, "aarch64", "float32", False),
        ("ppc64le", set(), {}, "ppc64le", "float32", False),
        # A processor is not wider than its environment lets it be.
        ("x86_64", AMX, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2", "float32", False),
        ("x86_64", AMX, {"ATEN_CPU_CAPABILITY": "avx2"}, "avx2", "float32", False),
        ("x86_64", AMX, {"ATEN_CPU_CAPABILITY": "default"}, "x86-64", "float32", False),
        ("x86_64", AMX, {"ATEN_CPU_CAPABILITY": "avx512"}, "amx_bf16", "bfloat16", True),
        ("x86_64", AMX, {"ONEDNN_MAX_CPU_ISA": "avx2_vnni_2"}, "avx2", "float32", False),
        ("x86_64", AMX, {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, "avx512", "float32", True),
        ("x86_64", AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "avx512", "float32", True),
        ("x86_64", AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16", "float32", True),
        ("x86_64", AMX, {"ONEDNN_MAX_CPU_ISA": "AVX10_1_512"}, "avx512_bf16", "float32", True),
        ("x86_64", AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "amx_bf16", "bfloat16", True),
        ("x86_64", AMX, {"ONEDNN_MAX_CPU_ISA": "SSE41"}, "x86-64", "float32", False),
        ("x86_64", AMX, {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, "amx_bf16", "bfloat16", True),
        ("x86_64", AMX, {"ONEDNN_MAX_CPU_ISA": "nonsense", "ATEN_CPU_CAPABILITY": "nonsense"}, "amx_bf16", "bfloat16", True),
        ("x86_64", AVX2, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "avx2", "float32", False),
    ],
)  # fmt: skip
def test_the_instruction_set_decides(
    pretend: Any, machine: str, has: set[str], limits: dict[str, str], instructions: str, dtype: str, packs: bool
) -> None:
    pretend(machine, has, **limits)
    assert (cpu_features.instruction_set(), cpu_features.auto_dtype()) == (instructions, dtype)
    assert cpu_features.packs_bfloat16() == packs
    assert cpu_features.report() == f"processor Test ({instructions}): dtype auto is {dtype} on it"


def test_one_probe_that_says_no_is_enough(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's own, and torch's for AVX-512, though the capabilities list more."""
    pretend("x86_64", AMX, onednn=False)
    assert (cpu_features.instruction_set(), cpu_features.auto_dtype()) == ("avx512", "float32")
    assert not cpu_features.packs_bfloat16()
    pretend("x86_64", AMX)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert (cpu_features.instruction_set(), cpu_features.auto_dtype()) == ("avx2", "float32")


def test_torch_without_onednn(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend("x86_64", AMX)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert (cpu_features.auto_dtype(), cpu_features.packs_bfloat16()) == ("float32", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_nothing_is_packed_where_onednn_refuses_bfloat16(pretend: Any, dtype: Any) -> None:
    """A model whose dtype the operator asked for works with torch's own linear layers."""
    native_ops()  # imports vLLM, which looks through torch.ops and would meet the patched probe
    pretend("x86_64", AVX2)
    config = LlamaConfig(
        vocab_size=31, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaModel(config).to(dtype)
    speed_up(model)
    kinds = [type(module) for module in model.modules()]
    assert PackedLinear not in kinds
    assert kinds.count(torch.nn.Linear) == 2 * 7
    assert model(torch.tensor([[1, 2, 3]])).last_hidden_state.dtype == dtype
