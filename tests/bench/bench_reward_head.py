"""reward_head against plain and compiled torch on one GPU: `python -P tests/bench/bench_reward_head.py`.

Bytes counted: the chosen rows, the head and the norm once, the result. Torch gathers, normalises in float32 and
projects, as models do in their own code.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from gpu_common import Table, limits, require_cuda
from report import write_section

from guiderail.kernels import reward_head


def plain(hidden: Any, last: Any, norm: Any, head: Any) -> Any:
    x = hidden[last].float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm
    return (x.to(hidden.dtype) @ head.T).float()


def main() -> None:
    require_cuda()
    table = Table(limits())
    compiled = torch.compile(plain, dynamic=False)
    for T, H, S, K in ((16384, 2048, 64, 1), (65536, 4096, 1024, 1), (65536, 4096, 1024, 19), (65536, 4096, 32768, 1)):
        hidden = torch.randn(T, H, dtype=torch.bfloat16, device="cuda")
        last = torch.randperm(T, device="cuda")[:S].sort().values
        norm = torch.ones(H, dtype=torch.bfloat16, device="cuda")
        head = torch.randn(K, H, dtype=torch.bfloat16, device="cuda")
        variants = {
            "guiderail": lambda h=hidden, i=last, n=norm, w=head: reward_head(h, i, n, 1e-5, w, validate=False),
            "torch": lambda h=hidden, i=last, n=norm, w=head: plain(h, i, n, w),
            "torch.compile": lambda h=hidden, i=last, n=norm, w=head: compiled(h, i, n, w),
        }
        table.case(f"H {H}, {S} rows, {K} outputs", variants, moved=2 * (S * H + K * H + H) + 4 * S * K)
    command = "python -P tests/bench/bench_reward_head.py"
    write_section("reward_head", "Kernel: reward head", command, table.lines, table.data)


if __name__ == "__main__":
    main()
