# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sample one token per sequence from logits tilted by another model, reading the logits once.

    z[v] = logits[v] + alpha * other[v],   p ~ exp(z / temperature)
    token = first v with sum_{w <= v} p[w] > uniform

The tilt is the weighted log-probabilities of another model: GenARM, Xu et al. 2024, arXiv 2410.08193.
Temperature 0 takes the first of the largest z.

Two kernels. The first gives every block of the vocabulary its own program, which leaves the block's maximum m
and its sum s of exp(z - m); one row of 256k logits would otherwise sit on one processor. The second, one
program per row, draws a block by its mass, then reads that one block again and draws the token in it.
Blocks lie in the vocabulary's order, so this is the inverse CDF above.

A NaN or +inf logit makes its block's s NaN, and a row of only -inf sums to 0: both show in the row's
log-probability, so the wrapper finds them without reading the logits again.
"""

import math
from typing import Any

import torch

from guiderail.kernels._dispatch import FLOATS, check, fail_if, jit, launch, next_power_of_2, tl, use_triton

BLOCK_V = 4096


@jit
def _tilted(
    row,
    start,
    logits_ptr,
    logits_row_stride,
    logits_col_stride,
    other_ptr,
    other_row_stride,
    other_col_stride,
    alpha_ptr,
    temperature_ptr,
    V,
    HAS_OTHER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return z / temperature (z for temperature 0) of one block of a row, -inf beyond the vocabulary."""
    v = start + tl.arange(0, BLOCK_V)
    inside = v < V
    at = v.to(tl.int64)
    z = tl.load(logits_ptr + row * logits_row_stride + at * logits_col_stride, mask=inside, other=float("-inf"))
    z = z.to(tl.float32)
    if HAS_OTHER:
        alpha = tl.load(alpha_ptr + row)
        if alpha != 0.0:  # a zero weight must silence the other model even where it says -inf
            o = tl.load(other_ptr + row * other_row_stride + at * other_col_stride, mask=inside, other=0.0)
            z += alpha * o.to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    return z / tl.where(temperature > 0.0, temperature, 1.0)


@jit(unaligned=("alpha_ptr", "temperature_ptr"))
def _block_mass_kernel(
    max_ptr,
    sum_ptr,
    logits_ptr,
    logits_row_stride,
    logits_col_stride,
    other_ptr,
    other_row_stride,
    other_col_stride,
    alpha_ptr,
    temperature_ptr,
    V,
    HAS_OTHER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: one block of one row; leaves the block's maximum and its sum of exp(z - maximum)."""
    row = tl.program_id(0).to(tl.int64)
    # fmt: off
    z = _tilted(
        row, tl.program_id(1) * BLOCK_V, logits_ptr, logits_row_stride, logits_col_stride,
        other_ptr, other_row_stride, other_col_stride, alpha_ptr, temperature_ptr, V, HAS_OTHER, BLOCK_V,
    )
    # fmt: on
    m = tl.max(z, axis=0)
    s = tl.sum(tl.exp(z - tl.where(m == float("-inf"), 0.0, m)), axis=0)  # 0 for a block of only -inf
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(max_ptr + out, m)
    tl.store(sum_ptr + out, s)


@jit(varying=("blocks",), unaligned=("alpha_ptr", "temperature_ptr", "uniform_ptr"))
def _draw_kernel(
    max_ptr,
    sum_ptr,
    uniform_ptr,
    token_ptr,
    logprob_ptr,
    blocks,
    logits_ptr,
    logits_row_stride,
    logits_col_stride,
    other_ptr,
    other_row_stride,
    other_col_stride,
    alpha_ptr,
    temperature_ptr,
    V,
    HAS_OTHER: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: one row; a block by its mass, then a token in it."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    m = tl.load(max_ptr + row * blocks + n, mask=n < blocks, other=float("-inf"))
    s = tl.load(sum_ptr + row * blocks + n, mask=n < blocks, other=0.0)
    top = tl.max(m, axis=0)
    mass = s * tl.exp(m - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(mass, axis=0)
    greedy = tl.load(temperature_ptr + row) <= 0.0
    cdf = tl.cumsum(mass, axis=0)
    target = tl.load(uniform_ptr + row) * tl.max(cdf, axis=0)
    drawn = tl.min(tl.where((cdf > target) & (mass > 0), n, BLOCK_N), axis=0)
    # Rounding of the scan can leave nothing above a target next to the total: then it is the last one.
    drawn = tl.where(drawn == BLOCK_N, tl.max(tl.where(mass > 0, n, 0), axis=0), drawn)
    likeliest = tl.min(tl.where(m == top, n, BLOCK_N), axis=0)
    block = tl.where(greedy, tl.where(likeliest == BLOCK_N, 0, likeliest), drawn)
    before = tl.sum(tl.where(n < block, mass, 0.0), axis=0)

    start = block * BLOCK_V
    # fmt: off
    z = _tilted(
        row, start, logits_ptr, logits_row_stride, logits_col_stride,
        other_ptr, other_row_stride, other_col_stride, alpha_ptr, temperature_ptr, V, HAS_OTHER, BLOCK_V,
    )
    # fmt: on
    i = tl.arange(0, BLOCK_V)
    e = tl.exp(z - top)
    inner = tl.min(tl.where((tl.cumsum(e, axis=0) > target - before) & (e > 0), i, BLOCK_V), axis=0)
    inner = tl.where(inner == BLOCK_V, tl.max(tl.where(e > 0, i, 0), axis=0), inner)
    # The block's own maximum, not `top`: two kernels may round z differently (fused multiply-add or not).
    first = tl.min(tl.where(z == tl.max(z, axis=0), i, BLOCK_V), axis=0)
    inner = tl.where(greedy, first, inner)
    logprob = tl.sum(tl.where(i == inner, z, 0.0), axis=0) - top - tl.log(total)
    sound = total > 0.0  # false for NaN too
    tl.store(token_ptr + row, tl.where(sound, (start + inner).to(tl.int64), -1))
    tl.store(logprob_ptr + row, tl.where(sound, logprob, float("nan")))


def _triton_path(logits, other, alpha, temperature, uniform) -> Any:
    B, V = logits.shape
    block_v = min(next_power_of_2(V), BLOCK_V)
    blocks = -(-V // block_v)
    m = torch.empty((B, blocks), dtype=torch.float32, device=logits.device)
    s = torch.empty((B, blocks), dtype=torch.float32, device=logits.device)
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(B, dtype=torch.float32, device=logits.device)
    dense = logits if other is None else other  # an absent tensor's pointer is never read
    inputs = (
        logits,
        logits.stride(0),
        logits.stride(1),
        dense,
        dense.stride(0),
        dense.stride(1),
        alpha.contiguous(),
        temperature.contiguous(),
        V,
    )
    shared = {"HAS_OTHER": other is not None, "BLOCK_V": block_v}
    launch(_block_mass_kernel, (B, blocks), m, s, *inputs, **shared, num_warps=8)
    block_n = next_power_of_2(blocks)
    launch(
        _draw_kernel,
        (B,),
        m,
        s,
        uniform.contiguous(),
        token,
        logprob,
        blocks,
        *inputs,
        **shared,
        BLOCK_N=block_n,
        num_warps=8,
    )
    return token, logprob


def _torch_path(logits, other, alpha, temperature, uniform) -> Any:
    z = logits.float()
    if other is not None:
        weight = alpha[:, None]
        z = z + torch.where(weight == 0, 0.0, weight * other.float())
    z = z / torch.where(temperature > 0, temperature, 1.0)[:, None]
    logprobs = torch.log_softmax(z, 1)
    cdf = logprobs.exp().cumsum(1, dtype=torch.float64)
    target = uniform[:, None].double() * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, target, right=True)[:, 0]
    token = torch.where(temperature > 0, drawn, z.argmax(1))
    sound = ~(z.isnan() | (z == math.inf)).any(1) & (z > -math.inf).any(1)
    token = token.where(sound, -1)
    logprob = logprobs.gather(1, token.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    return token, logprob.where(sound, math.nan)


def tilt_sample(
    logits: Any, other_logprobs: Any, alpha: Any, temperature: Any, uniform: Any, *, validate: bool = True
) -> tuple[Any, Any]:
    """Tilt, temper and sample one token per row.

    logits [B, V] float16, bfloat16 or float32, any strides, -inf allowed (probability 0); other_logprobs [B, V] of
    those dtypes, or None; alpha, temperature and uniform [B] float32. Where alpha is 0 the other model is silent,
    its -inf included. temperature 0: the first of the largest. The arithmetic is float32.
    validate=False skips the looks at values, which wait for the device; bad rows then have token -1 and a NaN.

    Return (token [B] int64, logprob [B] float32): the log-probability under the tilted, tempered distribution
    (for temperature 0, of temperature 1).

    Raises ValueError, naming the argument, for a wrong shape, dtype or device; non-finite alpha or temperature; a
    negative temperature; uniform outside [0, 1); and rows whose tilted logits hold a NaN or +inf or are all -inf.
    """
    check("logits", logits, (None, None), FLOATS)
    (B, V), device = logits.shape, logits.device
    if other_logprobs is not None:
        check("other_logprobs", other_logprobs, (B, V), FLOATS, device)
    for name, value in (("alpha", alpha), ("temperature", temperature), ("uniform", uniform)):
        check(name, value, (B,), (torch.float32,), device)
    if V == 0:
        raise ValueError("logits must have at least one column")
    if B == 0:
        return torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device)
    if validate:
        fail_if(
            [
                ((~alpha.isfinite()).any(), "alpha must be finite"),
                (~(temperature.isfinite() & (temperature >= 0)).all(), "temperature must be finite and at least 0"),
                (~((uniform >= 0) & (uniform < 1)).all(), "uniform must lie in [0, 1)"),
            ]
        )
    path = _triton_path if use_triton(logits) else _torch_path
    token, logprob = path(logits, other_logprobs, alpha, temperature, uniform)
    if validate:
        fail_if([(logprob.isnan().any(), "logits: a row's tilted logits hold a NaN or +inf, or are all -inf")])
    return token, logprob
