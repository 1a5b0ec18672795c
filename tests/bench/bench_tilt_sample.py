"""tilt_sample against plain and compiled torch on one GPU: `python -P tests/bench/bench_tilt_sample.py`.

Bytes counted: the logits once, the other model's log-probabilities once where there are any. The torch variants
sample with the same uniform numbers by a float32 CDF, which is what torch.multinomial does inside.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from gpu_common import Table, limits, require_cuda
from report import write_section

from guiderail.kernels import tilt_sample


def plain(logits: Any, other: Any, alpha: Any, temperature: Any, u: Any) -> Any:
    z = logits.float()
    if other is not None:
        z = z + alpha[:, None] * other
    logprobs = torch.log_softmax(z / temperature[:, None], 1)
    cdf = logprobs.exp().cumsum(1)
    token = (cdf <= u[:, None] * cdf[:, -1:]).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def main() -> None:
    require_cuda()
    table = Table(limits())
    compiled = torch.compile(plain, dynamic=False)
    for B, V, dense in ((1, 128256, False), (64, 128256, False), (64, 128256, True), (64, 262144, True)):
        logits = torch.randn(B, V, dtype=torch.bfloat16, device="cuda") * 3
        one = torch.ones(B, device="cuda")
        other = torch.log_softmax(torch.randn(B, V, device="cuda"), 1).bfloat16() if dense else None
        args = (logits, other, one, one, torch.rand(B, device="cuda"))
        variants = {
            "guiderail": lambda a=args: tilt_sample(*a, validate=False),
            "torch": lambda a=args: plain(*a),
            "torch.compile": lambda a=args: compiled(*a),
        }
        name = f"{B} rows of {V}{', other model' if dense else ''}"
        table.case(name, variants, moved=2 * B * V * (2 if dense else 1))
    command = "python -P tests/bench/bench_tilt_sample.py"
    write_section("tilt_sample", "Kernel: tilt and sample", command, table.lines, table.data)


if __name__ == "__main__":
    main()
