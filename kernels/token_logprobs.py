# mypy: allow-untyped-defs, allow-incomplete-defs
"""Compute log-probabilities of given tokens under a language-model head, without the [T, V] logits.

    out[t] = z[t, tokens[t]] - log sum_v exp(z[t, v]),   z = cap(hidden @ weight^T),   cap(z) = c * tanh(z / c)

The sum is carried as a running maximum m and a sum s of exp(z - m) over blocks of the vocabulary: online
softmax, Milakov & Gimelshein, arXiv 1805.02867. The cap is Gemma 2's, arXiv 2408.00118.

The Triton kernel splits the vocabulary over programs too, because T alone does not fill a GPU; each split
leaves (m, s, z of the token) and the splits are joined by a logsumexp over a [splits, T] tensor.
"""

import math
from typing import Any

import torch

from guiderail.kernels._dispatch import (
    FLOATS,
    LARGE_SHARED_MEMORY,
    check,
    fail_if,
    jit,
    launch,
    next_power_of_2,
    shared_memory_of,
    tl,
    use_triton,
)

CHUNK_ELEMENTS = 1 << 22  # of the torch path's widest temporary: 16 MiB of float32
PROGRAMS = 512  # about four per processor of a large GPU: enough to hide the tail of the last wave


@jit(varying=("T", "blocks_per_split"), unaligned=("tokens_ptr",))
def _token_logprobs_kernel(
    hidden_ptr,
    hidden_row_stride,
    hidden_col_stride,
    weight_ptr,
    weight_row_stride,
    weight_col_stride,
    tokens_ptr,
    lse_ptr,
    picked_ptr,
    T,
    V,
    H,
    blocks_per_split,
    softcap,
    HAS_CAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: BLOCK_T rows and one split of the vocabulary."""
    split = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t < T
    token = tl.load(tokens_ptr + t, mask=row, other=-1)
    x_ptr = hidden_ptr + t.to(tl.int64)[:, None] * hidden_row_stride
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    picked = tl.zeros([BLOCK_T], tl.float32)
    first = split * blocks_per_split * BLOCK_V
    for start in range(first, tl.minimum(first + blocks_per_split * BLOCK_V, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        w_ptr = weight_ptr + v.to(tl.int64)[None, :] * weight_row_stride  # int64: V x H passes 2^31
        z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for h_start in range(0, H, BLOCK_H):
            h = h_start + tl.arange(0, BLOCK_H)
            x_at = x_ptr + h.to(tl.int64)[None, :] * hidden_col_stride
            w_at = w_ptr + h.to(tl.int64)[:, None] * weight_col_stride
            x = tl.load(x_at, mask=row[:, None] & (h < H)[None, :], other=0.0)
            w = tl.load(w_at, mask=(h < H)[:, None] & (v < V)[None, :], other=0.0)
            z = tl.dot(x, w, z, input_precision="ieee")  # tf32 would lose 13 bits of float32 inputs
        if HAS_CAP:
            e = tl.exp(-2.0 * tl.abs(z) / softcap)
            capped = softcap * (1.0 - e) / (1.0 + e)
            z = tl.where(z < 0, -capped, capped)
        z = tl.where((v < V)[None, :], z, float("-inf"))
        picked += tl.sum(tl.where(v[None, :] == token[:, None], z, 0.0), axis=1)
        m_new = tl.maximum(m, tl.max(z, axis=1))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new[:, None]), axis=1)
        m = m_new
    out = split.to(tl.int64) * T + t
    tl.store(lse_ptr + out, m + tl.log(s), mask=row)
    tl.store(picked_ptr + out, picked, mask=row)


def largest_blocks(element_size: int, shared_memory: int) -> tuple[int, int, int]:
    """Return rows, tokens of the vocabulary and hidden sizes of a block that spills no register, given many rows.

    Where there is no wgmma (and so less shared memory), both operands of a product pass through registers.
    """
    if element_size == 4:
        return 64, 128, 32
    return 128, 128, 64 if shared_memory >= LARGE_SHARED_MEMORY else 32


def _triton_path(hidden, weight, tokens, softcap) -> Any:
    (T, H), V = hidden.shape, weight.shape[0]
    half = hidden.element_size() == 2
    most_t, block_v, most_h = largest_blocks(hidden.element_size(), shared_memory_of(hidden))
    block_t, block_h = (min(max(next_power_of_2(n), 16), most) for n, most in ((T, most_t), (H, most_h)))  # tl.dot: 16
    row_blocks, vocab_blocks = -(-T // block_t), -(-V // block_v)
    per_split = -(-vocab_blocks // max(1, min(vocab_blocks, PROGRAMS // row_blocks)))
    splits = -(-vocab_blocks // per_split)  # so that no split is empty
    lse = torch.empty((splits, T), dtype=torch.float32, device=hidden.device)
    picked = torch.empty((splits, T), dtype=torch.float32, device=hidden.device)
    launch(
        _token_logprobs_kernel,
        (row_blocks, splits),
        hidden,
        hidden.stride(0),
        hidden.stride(1),
        weight,
        weight.stride(0),
        weight.stride(1),
        tokens.contiguous(),
        lse,
        picked,
        T,
        V,
        H,
        per_split,
        float(softcap or 1.0),
        HAS_CAP=softcap is not None,
        BLOCK_T=block_t,
        BLOCK_V=block_v,
        BLOCK_H=block_h,
        num_warps=8 if block_t == 128 or not half else 4,
        num_stages=3,
    )
    return picked.sum(0) - torch.logsumexp(lse, 0)


def _torch_path(hidden, weight, tokens, softcap) -> Any:
    (T, H), V = hidden.shape, weight.shape[0]
    x = hidden.float()
    chunk = max(1, min(V, CHUNK_ELEMENTS // max(T, H)))  # bounds the logits [T, chunk] and the weights [chunk, H]
    m = torch.full((T,), float("-inf"), device=hidden.device)
    s = torch.zeros(T, device=hidden.device)
    picked = torch.zeros(T, device=hidden.device)
    for start in range(0, V, chunk):
        z = x @ weight[start : start + chunk].float().T
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        here = (tokens >= start) & (tokens < start + z.shape[1])
        at = torch.where(here, tokens - start, 0)
        picked = torch.where(here, z.gather(1, at[:, None])[:, 0], picked)
        m_new = torch.maximum(m, z.amax(1))
        s = s * torch.exp(m - m_new) + torch.exp(z - m_new[:, None]).sum(1)
        m = m_new
    return picked - (m + torch.log(s))


def token_logprobs(
    hidden: Any, weight: Any, tokens: Any, *, softcap: float | None = None, validate: bool = True
) -> Any:
    """Compute the log-probability of one given token per row of hidden states.

    hidden [T, H] and weight [V, H] of one dtype, float16, bfloat16 or float32, any strides; tokens [T] int64 in
    [0, V); softcap: positive cap of the logits, or None. validate=False skips the look at the values of `tokens`,
    which waits for the device; a token outside the vocabulary then yields a meaningless number.

    Return [T] float32; products are summed in float32. A row of `hidden` with a NaN gives NaN, and so does an
    infinity without a softcap; other rows are untouched. Temporaries: on the Triton path two [splits, T] tensors,
    at most 512 splits; on the torch path a float32 copy of `hidden` and blocks of 16 MiB.

    Raises ValueError, naming the argument, for a wrong shape, dtype or device, a softcap that is not a positive
    finite number, or a token outside the vocabulary.
    """
    check("hidden", hidden, (None, None), FLOATS)
    T, H = hidden.shape
    check("weight", weight, (None, H), (hidden.dtype,), hidden.device)
    check("tokens", tokens, (T,), (torch.int64,), hidden.device)
    if H == 0 or weight.shape[0] == 0:
        raise ValueError("weight must have at least one row and one column")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be a positive finite number, not {softcap}")
    if T == 0:
        return torch.empty(0, dtype=torch.float32, device=hidden.device)
    if validate:
        V = weight.shape[0]
        fail_if([(((tokens < 0) | (tokens >= V)).any(), f"tokens must lie in [0, {V})")])
    return (_triton_path if use_triton(hidden) else _torch_path)(hidden, weight, tokens, softcap)
