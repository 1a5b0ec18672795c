"""Compute attention for ragged batches that share prefixes: each prefix is attended to once for all that continue it.

The rows of a batch are new tokens in depth-first order of a tree of segments (prompt, answers so far,
candidates, rollouts). Row i, at position p_i, attends to
  - its own segment, causally, and
  - the tokens of every segment above it (`Context`), whose keys and values lie in a pool.
Because of the order, the rows beneath a segment are one range, so a context is one block of queries times
one block of keys. Each block gives a partial softmax (output o_j, log-sum-exp l_j); partials merge as
    o = sum_j exp(l_j - l) o_j,   l = log sum_j exp(l_j)
(the split softmax of FlashAttention, Dao et al. 2022, arXiv 2205.14135, section 3.1). No padding is computed.

Optional: sliding window w (keys at positions > p_i - w) and logit soft-cap c (s -> c tanh(s / c)).

The Triton kernel is in _shared_prefix_triton.py, as it would make this file too long.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from guiderail.kernels._dispatch import use_triton
from guiderail.kernels.prefix_layout import Context, Layout, on_device

__all__ = ["Context", "Layout", "prepare", "shared_prefix_attention"]

SMALLEST_TOTAL, LARGEST_TOTAL = 1e-20, 1e20  # between them exp() of bfloat16 scores and its sums are precise enough
PRODUCT_SIZE = 65_536  # rows times keys from which the plain products win, on a CPU with bfloat16 vectors
# torch's fused attention uses matrix tiles (AMX) and then takes half of the plain products' time; with bfloat16 vectors
# alone (avx512_bf16) it takes 2.5 times as long as they. Without either these are emulated: on AVX2 the products of 9
# heads of 64 take 9 (64 keys) to 28 (256 keys) times as long as the fused attention.
PLAIN_PRODUCTS = torch.cpu._is_avx512_bf16_supported() and not torch.cpu.get_capabilities().get("amx_bf16", False)


def _torch(
    q: Any, k: Any, v: Any, kp: Any, vp: Any, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Any:
    """Take the CPU path: fused blocks where there is no mask but causality, explicit scores otherwise."""
    longest = int(layout.positions.max()) + 1
    positions = layout.positions.to(q.device)
    if window is not None and window >= longest:
        window = None  # nothing is ever out of the window
    fused = q.device.type == "cpu" and window is None and softcap is None and not (_has_nan(q) or _has_nan(k))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for length, starts in _by_length(layout.segments).items():
        _segments(q, k, v, out, lse, length, starts, positions, scale, window, softcap, fused)
    for context in layout.contexts:
        rows = slice(context.start, context.end)
        slots = context.slots.to(q.device)
        keys, values = kp.index_select(0, slots), vp.index_select(0, slots)
        if fused and not _has_nan(keys):
            part, part_lse = _fused_context(q[rows], keys, values, scale)
        else:
            first = context.first_position
            key_positions = torch.arange(first, first + len(context.slots), device=q.device)
            part, part_lse = _explicit(q[rows], keys, values, positions[rows], key_positions, scale, window, softcap)
        _merge(out[rows], lse[rows], part, part_lse)
    return out


def _has_nan(tensor: Any) -> bool:
    """Return True if a tensor may hold a NaN: torch's fused attention takes a row of NaN scores for a masked one."""
    return bool(tensor.sum().isnan())


def _by_length(segments: tuple[tuple[int, int], ...]) -> dict[int, list[int]]:
    """Return the starts of the segments of each length: equal ones are one dense batch, so that nothing is padded."""
    found: dict[int, list[int]] = {}
    for start, end in segments:
        found.setdefault(end - start, []).append(start)
    return found


def _segments(
    q: Any, k: Any, v: Any, out: Any, lse: Any, length: int, starts: list[int], positions: Any,
    scale: float, window: int | None, softcap: float | None, fused: bool,
) -> None:  # fmt: skip
    """Put causal attention of all segments of one length among themselves into out and lse."""
    step = torch.arange(length, device=q.device)
    if len(starts) * length == starts[-1] - starts[0] + length:  # they lie side by side
        rows: Any = slice(starts[0], starts[-1] + length)
    else:
        rows = (torch.tensor(starts, device=q.device)[:, None] + step).reshape(-1)
    batch = (len(starts), length)
    if fused:
        dense = [each[rows].unflatten(0, batch) for each in (q, k, v)]  # [B, L, H, D]
        made = _product_segments(dense[0], dense[1], dense[2], scale)
        if made is not None:
            out[rows], lse[rows] = made[0].to(out.dtype), made[1]
            return
        heads = (each.transpose(1, 2) for each in dense)
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, is_causal=True, scale=scale)
        out[rows] = part.transpose(1, 2).flatten(0, 1)
        lse[rows] = part_lse.transpose(1, 2).flatten(0, 1)
        return
    for start in starts:
        own = slice(start, start + length)
        where = positions[own]
        out_part, part_lse = _explicit(q[own], k[own], v[own], where, where, scale, window, softcap)
        out[own], lse[own] = out_part.to(out.dtype), part_lse


def _products_win(q: Any, size: int) -> bool:
    """Return True where plain products are the faster way for a block of `size` rows times keys."""
    return PLAIN_PRODUCTS and q.dtype == torch.bfloat16 and size >= PRODUCT_SIZE


def _product_context(q: Any, k: Any, v: Any, scale: float) -> tuple[Any, Any] | None:
    """Do _fused_context by plain bfloat16 products: see PLAIN_PRODUCTS for where they are faster.

    Scores and unnormalised weights are rounded to bfloat16, as in transformers' eager attention. No row maximum is
    subtracted (a third of the time): None is returned where that could overflow or lose a row, for the fused path.
    """
    n, heads, dim = q.shape
    kv_heads = k.shape[1]
    share = heads // kv_heads
    folded = (q * scale).view(n, kv_heads, share, dim).permute(1, 2, 0, 3).reshape(kv_heads, share * n, dim)
    out = torch.empty((n, heads, dim), dtype=torch.float32)
    lse = torch.empty((heads, n), dtype=torch.float32)
    for head in range(kv_heads):
        weights = torch.mm(folded[head], k[:, head].t()).exp_()  # [share * n, C]
        total = weights.sum(-1, dtype=torch.float32)
        if not _in_range(total):
            return None
        part = torch.mm(weights, v[:, head]) / total[:, None]
        mine = slice(head * share, (head + 1) * share)
        out[:, mine] = part.view(share, n, dim).transpose(0, 1)
        lse[mine] = total.log_().view(share, n)
    return out, lse.t()


def _in_range(total: Any) -> bool:
    """Return True if sums of unnormalised weights are all usable; False if any is NaN."""
    low, high = torch.aminmax(total)
    return float(low) >= SMALLEST_TOTAL and float(high) <= LARGEST_TOTAL


def _product_segments(q: Any, k: Any, v: Any, scale: float) -> tuple[Any, Any] | None:
    """Compute causal attention within segments [B, L, H, D] by plain bfloat16 products; see _product_context.

    Return out [B * L, Hq, D] float32 and log-sum-exp [B * L, Hq], or None where the fused path must be taken.
    """
    batch, length, heads, dim = q.shape
    if not _products_win(q, batch * length * length):
        return None
    kv_heads = k.shape[2]
    share = heads // kv_heads
    folded = (q * scale).view(batch, length, kv_heads, share, dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(batch * kv_heads, share * length, dim)
    keys = k.permute(0, 2, 3, 1).reshape(batch * kv_heads, dim, length)
    weights = torch.bmm(folded, keys).exp_()  # [B * Hkv, share * L, L]
    causal = torch.ones(length, length, dtype=q.dtype).tril_()
    weights.view(-1, length, length).mul_(causal)  # an infinite weight that is masked makes a NaN, which is refused
    total = weights.sum(-1, dtype=torch.float32)
    if not _in_range(total):
        return None
    out = torch.bmm(weights, v.transpose(1, 2).reshape(batch * kv_heads, length, dim)) / total[..., None]
    out = out.view(batch, kv_heads, share, length, dim).permute(0, 3, 1, 2, 4).reshape(batch * length, heads, dim)
    return out, total.log_().view(batch, heads, length).transpose(1, 2).reshape(batch * length, heads)


def _fused_context(q: Any, k: Any, v: Any, scale: float) -> tuple[Any, Any]:
    """Compute unmasked attention of rows [n, Hq, D] to keys [C, Hkv, D]."""
    if _products_win(q, q.shape[0] * len(k)):
        made = _product_context(q, k, v, scale)
        if made is not None:
            return made
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(each.transpose(0, 1)[None] for each in (q, k, v)), scale=scale
    )
    return out[0].transpose(0, 1), lse[0].t()


def _explicit(
    q: Any, k: Any, v: Any, q_at: Any, k_at: Any, scale: float, window: int | None, softcap: float | None
) -> tuple[Any, Any]:
    """Compute masked attention with scores written out: out [n, Hq, D] and log-sum-exp [n, Hq], both float32."""
    share = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(share, 1)
    scores = torch.einsum("nhd,chd->hnc", q.float(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = k_at[None, :] > q_at[:, None]
    if window is not None:
        hidden = hidden | (k_at[None, :] <= q_at[:, None] - window)
    scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores, -1)  # -inf where a row sees none of these keys, whose weights are then all 0
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return torch.einsum("hnc,chd->nhd", weights, v.float().repeat_interleave(share, 1)), lse.t()


def _merge(out: Any, lse: Any, part: Any, part_lse: Any) -> None:
    """Merge a partial softmax into (out, lse), in place."""
    weight = torch.sigmoid(part_lse - lse).masked_fill_(part_lse == -math.inf, 0.0)[..., None]  # of the part
    torch.lerp(out, part.to(out.dtype), weight.to(out.dtype), out=out)  # computes in float32, in a quarter of its time
    torch.logaddexp(lse, part_lse, out=lse)


def _check(q: Any, k: Any, v: Any, kp: Any, vp: Any, layout: Layout, window: int | None, softcap: float | None) -> None:
    rows, heads, dim = q.shape if q.dim() == 3 else (0, 0, 0)
    if rows != layout.positions.shape[0]:
        raise ValueError(f"query must be [{layout.positions.shape[0]}, heads, dim], not {tuple(q.shape)}")
    kv_heads = k.shape[1] if k.dim() == 3 else 0
    if k.shape != (rows, kv_heads, dim) or v.shape != k.shape or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key {tuple(k.shape)} and value {tuple(v.shape)} do not fit query {tuple(q.shape)}")
    if kp.dim() != 3 or kp.shape[1:] != k.shape[1:] or vp.shape != kp.shape:
        raise ValueError(f"key_pool {tuple(kp.shape)} and value_pool {tuple(vp.shape)} must be [P, {kv_heads}, {dim}]")
    if len({q.dtype, k.dtype, v.dtype, kp.dtype, vp.dtype}) != 1 or q.dtype not in (
        torch.float16, torch.bfloat16, torch.float32,
    ):  # fmt: skip
        raise ValueError("query, key, value and pools must share one dtype of float16, bfloat16 and float32")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")


def prepare(
    layout: Layout, heads: int, pool: Any, beside: Sequence[np.ndarray[Any, np.dtype[np.int64]]] = ()
) -> list[Any]:
    """Move what attention needs to know of a layout to the device of a pool [P, Hkv, D], once for all layers.

    heads: query heads. beside: arrays that go with it, in the same copy, which nothing waits for; returned as tensors
    there. Optional: attention that finds a layout unprepared prepares it.
    """
    if use_triton(pool):
        from guiderail.kernels._shared_prefix_triton import place

        return place(layout, heads, pool, beside)
    return on_device(beside, pool.device)


def shared_prefix_attention(
    query: Any,
    key: Any,
    value: Any,
    key_pool: Any,
    value_pool: Any,
    layout: Layout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Any:
    """Compute attention of the batch's rows: [T, Hq, D] in query's dtype, accumulated in float32.

    query: [T, Hq, D]; key, value: [T, Hkv, D] of the same rows; key_pool, value_pool: [P, Hkv, D], holding the
    contexts' tokens. fp16, bf16 or fp32, all of one dtype; Hq a multiple of Hkv. scale defaults to D ** -0.5.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    _check(query, key, value, key_pool, value_pool, layout, window, softcap)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if use_triton(query):
        from guiderail.kernels._shared_prefix_triton import attention

        return attention(query, key, value, key_pool, value_pool, layout, scale, window, softcap)
    return _torch(query, key, value, key_pool, value_pool, layout, scale, window, softcap)
