"""Parts shared by the kernel benchmarks: the card's measured limits, timing, and tables.

Limits are measured in the same run as the kernels, because clocks differ between cards and days: the
bandwidth by a large copy (read and write counted), the arithmetic by a large bfloat16 matrix product.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


def require_cuda() -> None:
    """End the script, successfully, where there is no GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        sys.exit(0)
    torch.manual_seed(0)


@cache
def _flush() -> Any:
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def milliseconds(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of a call on the device, each after the L2 cache was overwritten.

    The overwriting also keeps the device busy while the host prepares the call, so launches are not counted.
    """
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        _flush().zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


@dataclass(frozen=True)
class Limits:
    """Measured limits of the card in this run, in bytes and operations per second."""

    bytes_per_s: float
    flops_per_s: float

    def line(self) -> str:
        return (
            f"Limits in this run: copy {self.bytes_per_s / 1e9:.0f} GB/s, GEMM {self.flops_per_s / 1e12:.0f} TFLOP/s."
        )


def limits() -> Limits:
    """Copy 2 GiB, and multiply two 8192 x 8192 bfloat16 matrices."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size() / milliseconds(lambda: target.copy_(source), 10) * 1e3
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return Limits(copied, 2 * 8192**3 / milliseconds(lambda: a @ a, 10) * 1e3)


@dataclass
class Table:
    """Rows of one benchmark: every variant of every case with its share of the limit that binds it."""

    limits: Limits

    def __post_init__(self) -> None:
        self.lines = [self.limits.line(), "", "| case | variant | time | rate | of the limit | ours is faster by |"]
        self.lines.append("|---|---|---|---|---|---|")
        self.data: dict[str, Any] = {"limits": vars(self.limits), "cases": {}}

    def case(
        self,
        name: str,
        variants: dict[str, Callable[[], Any]],
        *,
        moved: float | None = None,
        flops: float | None = None,
    ) -> None:
        """Time the variants ("guiderail" is ours). `moved` (bytes) or `flops` is the work that the problem itself requires.

        All variants are charged the same work, so one that moves more shows a lower rate.
        """
        times = {}
        for variant, call in variants.items():
            try:
                times[variant] = milliseconds(call)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                self.lines.append(f"| {name} | {variant} | out of memory | | | |")
        for variant, ms in times.items():
            if moved is not None:
                rate, limit, text = moved / ms * 1e3, self.limits.bytes_per_s, f"{moved / ms / 1e6:.0f} GB/s"
            else:
                work = flops or 0.0
                rate, limit, text = work / ms * 1e3, self.limits.flops_per_s, f"{work / ms / 1e9:.1f} TFLOP/s"
            ratio = ms / times["guiderail"] if "guiderail" in times else float("nan")
            self.lines.append(f"| {name} | {variant} | {ms:.3f} ms | {text} | {rate / limit:.0%} | {ratio:.2f} x |")
            cases = self.data["cases"].setdefault(name, {})
            cases[variant] = {"ms": ms, "rate": rate, "of_limit": rate / limit, "ours_faster_by": ratio}
