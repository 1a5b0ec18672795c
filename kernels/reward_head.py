# mypy: allow-untyped-defs, allow-incomplete-defs
"""Compute a reward model's head at chosen rows of packed hidden states, in one pass.

    out[s, k] = b[k] + sum_h W[k, h] * g[h] * x[h] / sqrt(mean(x^2) + eps),   x = hidden[last[s]]

RMSNorm: Zhang & Sennrich, arXiv 1910.07467 (Gemma's weight is stored as an offset from one, g = 1 + w).
The scale factor is the same for all h, so the sum of squares and the K dot products are gathered in one
sweep over the row, and the division comes last. Only the rows asked for are read.

Everything after the load is float32: models that round the normalised row to bf16 before the head differ
from this by that rounding.
"""

from typing import Any

import torch

from guiderail.kernels._dispatch import FLOATS, check, fail_if, jit, launch, next_power_of_2, tl, use_triton


@jit(varying=("K",), unaligned=("last_ptr", "bias_ptr"))
def _reward_head_kernel(
    hidden_ptr,
    hidden_row_stride,
    hidden_col_stride,
    last_ptr,
    norm_ptr,
    weight_ptr,
    weight_row_stride,
    weight_col_stride,
    bias_ptr,
    out_ptr,
    H,
    K,
    eps,
    HAS_NORM: tl.constexpr,
    GEMMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: one sequence and BLOCK_K outputs."""
    s = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    # int64: row x hidden size passes 2^31 for long packed batches.
    x_ptr = hidden_ptr + tl.load(last_ptr + s).to(tl.int64) * hidden_row_stride
    w_ptr = weight_ptr + k.to(tl.int64)[:, None] * weight_row_stride
    dots = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)  # reduced once at the end, not once per block
    squares = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < H
        x = tl.load(x_ptr + h.to(tl.int64) * hidden_col_stride, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            g = tl.load(norm_ptr + h, mask=inside, other=0.0).to(tl.float32)
            if GEMMA:
                g += 1.0
            x = x * g
        w = tl.load(
            w_ptr + h.to(tl.int64)[None, :] * weight_col_stride,
            mask=(k < K)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        dots += w * x[None, :]
    out = tl.sum(dots, axis=1)
    if HAS_NORM:
        out = out / tl.sqrt(tl.sum(squares, axis=0) / H + eps)
    if HAS_BIAS:
        out += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + s * K + k, out, mask=k < K)


def _triton_path(hidden, last, norm_weight, eps, head_weight, head_bias, gemma_style) -> Any:
    (S,), (K, H) = last.shape, head_weight.shape
    out = torch.empty((S, K), dtype=torch.float32, device=hidden.device)
    block_k = min(next_power_of_2(K), 16)
    block_h = min(next_power_of_2(H), max(4096 // block_k, 256))  # the [BLOCK_K, BLOCK_H] sums stay in registers
    norm = hidden if norm_weight is None else norm_weight.contiguous()  # an absent tensor's pointer is never read
    bias = hidden if head_bias is None else head_bias.contiguous()
    launch(
        _reward_head_kernel,
        (S, -(-K // block_k)),
        hidden,
        hidden.stride(0),
        hidden.stride(1),
        last.contiguous(),
        norm,
        head_weight,
        head_weight.stride(0),
        head_weight.stride(1),
        bias,
        out,
        H,
        K,
        float(eps),
        HAS_NORM=norm_weight is not None,
        GEMMA=gemma_style,
        HAS_BIAS=head_bias is not None,
        BLOCK_K=block_k,
        BLOCK_H=block_h,
    )
    return out


def _torch_path(hidden, last, norm_weight, eps, head_weight, head_bias, gemma_style) -> Any:
    x = hidden[last].float()
    if norm_weight is not None:
        g = norm_weight.float() + 1.0 if gemma_style else norm_weight.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * g
    out = x @ head_weight.float().T
    return out if head_bias is None else out + head_bias.float()


def reward_head(
    hidden: Any,
    last: Any,
    norm_weight: Any,
    eps: float,
    head_weight: Any,
    head_bias: Any = None,
    *,
    gemma_style: bool = False,
    validate: bool = True,
) -> Any:
    """Gather rows, apply the final RMSNorm and project to the reward head's outputs.

    hidden [T, H] float16, bfloat16 or float32, any strides; last [S] int64, the row of each sequence's last (or
    marked) token, repeats allowed; norm_weight [H], or None where `hidden` is already normalised and the norm is
    skipped; eps > 0 is used with a norm alone; head_weight [K, H]; head_bias [K] or None; gemma_style: the norm's
    weight is 1 + norm_weight. Weights may have another float dtype than `hidden`. validate=False skips the look at
    the values of `last`, which waits for the device; rows outside [0, T) are then undefined behaviour.

    Return [S, K] float32. A non-finite value in a row makes that row of the result non-finite, and no other.

    Raises ValueError, naming the argument, for a wrong shape, dtype or device, eps <= 0 or a row outside [0, T).
    """
    check("hidden", hidden, (None, None), FLOATS)
    T, H = hidden.shape
    check("last", last, (None,), (torch.int64,), hidden.device)
    check("head_weight", head_weight, (None, H), FLOATS, hidden.device)
    if norm_weight is not None:
        check("norm_weight", norm_weight, (H,), FLOATS, hidden.device)
        if not eps > 0:
            raise ValueError(f"eps must be positive, not {eps}")
    if head_bias is not None:
        check("head_bias", head_bias, (head_weight.shape[0],), FLOATS, hidden.device)
    if H == 0 or head_weight.shape[0] == 0:
        raise ValueError("head_weight must have at least one row and one column")
    if last.numel() == 0:
        return torch.empty((0, head_weight.shape[0]), dtype=torch.float32, device=hidden.device)
    if validate:
        fail_if([(((last < 0) | (last >= T)).any(), f"last must hold rows in [0, {T})")])
    path = _triton_path if use_triton(hidden) else _torch_path
    return path(hidden, last, norm_weight, eps, head_weight, head_bias, gemma_style)
