"""token_logprobs against plain and compiled torch on one GPU: `python -P tests/bench/bench_token_logprobs.py`.

Operations counted: 2 T V H of the product. Torch makes the [T, V] logits in bfloat16 (a rounding ours does not
have) and takes a float32 log-softmax of them. Peak memory beyond the inputs is reported for each variant.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from gpu_common import Table, limits, require_cuda
from report import write_section

from guiderail.kernels import token_logprobs


def plain(hidden: Any, weight: Any, tokens: Any) -> Any:
    return -torch.nn.functional.cross_entropy((hidden @ weight.T).float(), tokens, reduction="none")


def peak_mib(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        call()
    except torch.cuda.OutOfMemoryError:
        return float("inf")
    return float(torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    require_cuda()
    table = Table(limits())
    compiled = torch.compile(plain, dynamic=False)
    memory = []
    for T, V, H in ((64, 128256, 4096), (1024, 128256, 4096), (8192, 128256, 4096), (4096, 49152, 576)):
        hidden = torch.randn(T, H, dtype=torch.bfloat16, device="cuda")
        weight = torch.randn(V, H, dtype=torch.bfloat16, device="cuda") * H**-0.5
        args = (hidden, weight, torch.randint(V, (T,), device="cuda"))
        variants = {
            "guiderail": lambda a=args: token_logprobs(*a, validate=False),
            "torch": lambda a=args: plain(*a),
            "torch.compile": lambda a=args: compiled(*a),
        }
        name = f"{T} tokens, vocabulary {V}, hidden {H}"
        table.case(name, variants, flops=2.0 * T * V * H)
        peaks = {variant: peak_mib(call) for variant, call in variants.items()}
        memory.append(f"Memory beyond the inputs, {name}: " + ", ".join(f"{v} {m:.0f} MiB" for v, m in peaks.items()))
        table.data["cases"].setdefault(name, {})["peak_mib"] = {
            v: m if m < float("inf") else None for v, m in peaks.items()
        }
    command = "python -P tests/bench/bench_token_logprobs.py"
    write_section("token_logprobs", "Kernel: token log-probabilities", command, [*table.lines, "", *memory], table.data)


if __name__ == "__main__":
    main()
