"""reward_pipeline against torch on one GPU: `python -P tests/bench/bench_reward_pipeline.py`.

The torch variants are the operation's own torch path on the GPU, eager and compiled. The problem is small, so
the table shows launches saved; the bytes counted are rewards, samples and results, once each.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from gpu_common import Table, limits, require_cuda
from report import write_section

from guiderail.kernels import reward_pipeline
from guiderail.kernels._dispatch import force
from guiderail.kernels.reward_pipeline import Transform, _torch_path


def main() -> None:
    require_cuda()
    table = Table(limits())
    compiled = torch.compile(_torch_path, dynamic=False)
    for G, C, R, M in ((1, 16, 3, 128), (16, 16, 3, 128), (64, 64, 4, 512), (512, 64, 4, 512)):
        codes = torch.tensor([Transform.EXP, Transform.LOG_SIGMOID, Transform.CALIBRATED, Transform.LOG][:R])
        args: dict[str, Any] = {
            "rewards": torch.randn(G, C, R),
            "counts": torch.full((G,), C),
            "calibration": torch.randn(G, R, M).sort(2).values,
            "codes": codes,
            "params": torch.ones(R, 3),
            "weights": torch.ones(R),
        }
        args = {name: value.cuda() for name, value in args.items()}
        uniform = torch.rand(G, device="cuda")

        def ours(a: dict[str, Any] = args, u: Any = uniform) -> Any:
            return reward_pipeline(**a, uniform=u, validate=False)

        def plain(a: dict[str, Any] = args, u: Any = uniform) -> Any:
            with force("torch"):
                return reward_pipeline(**a, uniform=u, validate=False)

        def fused(a: dict[str, Any] = args, u: Any = uniform) -> Any:
            first = (a["rewards"], a["counts"], a["calibration"], None)
            return compiled(*first, a["codes"], a["params"], a["weights"], 1.0, u)

        variants = {"guiderail": ours, "torch": plain, "torch.compile": fused}
        moved = 4 * (2 * G * C * R + G * C + G * R * M) + 8 * G
        table.case(f"{G} groups of {C}, {R} rewards, {M} samples", variants, moved=moved)
    command = "python -P tests/bench/bench_reward_pipeline.py"
    write_section("reward_pipeline", "Kernel: reward pipeline", command, table.lines, table.data)


if __name__ == "__main__":
    main()
