# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton path of shared_prefix_attention: partial softmaxes by block, then a merge.

One program of the first kernel takes a block of query rows, all query heads of one KV head, and one level of
the tree: its own segment (causal) or one context. The keys of a context are thus read once for a block of
rows of all candidates beneath it. The second kernel merges the levels of each row.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch

from guiderail.kernels._dispatch import jit, next_power_of_2, tl

BLOCK_N = 32
ROWS = 16  # query rows of a work item; times the heads of a group, at least tl.dot's 16
COLUMNS = 7  # of a work item: row start, row end, level, first key, keys, first key position, is own segment


@jit
def _partial_kernel(
    q_ptr, k_ptr, v_ptr, kp_ptr, vp_ptr, slots_ptr, positions_ptr, items_ptr, out_ptr, lse_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, kp_row, kp_head, vp_row, vp_head, T,
    scale, window, softcap,
    HEADS: tl.constexpr, SHARE: tl.constexpr, SHARE_P: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    item = items_ptr + tl.program_id(0) * COLUMNS
    kv_head = tl.program_id(1)
    row_start, row_end, level = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    first_key, n_keys, first_position = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    own = tl.load(item + 6) != 0
    m = tl.arange(0, BLOCK_R * SHARE_P)
    row = row_start + m // SHARE_P
    head = kv_head * SHARE + m % SHARE_P
    valid = (row < row_end) & (m % SHARE_P < SHARE)
    d = tl.arange(0, D_P)
    q_at = q_ptr + row[:, None] * q_row + head[:, None] * q_head + d[None, :]
    q = tl.load(q_at, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    at = tl.load(positions_ptr + row, mask=valid, other=0)
    top = tl.full([BLOCK_R * SHARE_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R * SHARE_P], tl.float32)
    acc = tl.zeros([BLOCK_R * SHARE_P, D_P], tl.float32)
    for start in range(0, n_keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < n_keys
        kv_mask = inside[:, None] & (d < D)[None, :]
        if own:
            index = first_key + n  # rows of this batch
            k = tl.load(k_ptr + index[:, None] * k_row + kv_head * k_head + d[None, :], mask=kv_mask, other=0.0)
            v = tl.load(v_ptr + index[:, None] * v_row + kv_head * v_head + d[None, :], mask=kv_mask, other=0.0)
        else:
            index = tl.load(slots_ptr + first_key + n, mask=inside, other=0)
            k = tl.load(kp_ptr + index[:, None] * kp_row + kv_head * kp_head + d[None, :], mask=kv_mask, other=0.0)
            v = tl.load(vp_ptr + index[:, None] * vp_row + kv_head * vp_head + d[None, :], mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            x = scores / softcap
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0)  # tanh
        key_at = first_position + n
        seen = inside[None, :] & (key_at[None, :] <= at[:, None])
        if WINDOW:
            seen = seen & (key_at[None, :] > at[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
        p = tl.exp(scores - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    place = (level * T + row) * HEADS + head
    lse = tl.where(total > 0, tl.where(top == float("-inf"), 0.0, top) + tl.log(total), float("-inf"))
    tl.store(lse_ptr + place, lse, mask=valid)
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + place[:, None] * D + d[None, :], out, mask=valid[:, None] & (d < D)[None, :])


@jit
def _merge_kernel(
    parts_ptr, lse_ptr, out_ptr, T, HEADS: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, LEVELS
):  # fmt: skip
    """One program: one row and head; running merge over the levels."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D_P)
    lse = tl.load(lse_ptr + row * HEADS + head)
    acc = tl.load(parts_ptr + (row * HEADS + head) * D + d, mask=d < D, other=0.0)
    for level in range(1, LEVELS):
        place = (level * T + row) * HEADS + head
        other = tl.load(lse_ptr + place)
        if other > float("-inf"):  # rows without this level hold nothing there
            part = tl.load(parts_ptr + place * D + d, mask=d < D, other=0.0)
            top = tl.maximum(lse, other)
            mine, theirs = tl.exp(lse - top), tl.exp(other - top)
            acc = (acc * mine + part * theirs) / (mine + theirs)
            lse = top + tl.log(mine + theirs)
    tl.store(out_ptr + (row * HEADS + head) * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)


_work: "WeakKeyDictionary[Any, tuple[Any, Any, int]]" = WeakKeyDictionary()


def _work_items(layout: Any) -> tuple[Any, Any, int]:
    """(items [I, COLUMNS] int64, all contexts' slots [C] int64, number of levels); made once per layout."""
    if layout in _work:
        return _work[layout]
    device = layout.positions.device
    positions = layout.positions.cpu()
    items: list[tuple[int, ...]] = []
    for start, end in layout.segments:
        for row in range(start, end, ROWS):
            last = min(row + ROWS, end)
            items.append((row, last, 0, start, last - start, int(positions[start]), 1))
    depth = [1] * len(positions)  # next level of each row: contexts come parents first and nest
    offset, levels = 0, 1
    for context in layout.contexts:
        level = depth[context.start]
        levels = max(levels, level + 1)
        for row in range(context.start, context.end, ROWS):
            last = min(row + ROWS, context.end)
            items.append((row, last, level, offset, len(context.slots), context.first_position, 0))
        depth[context.start : context.end] = [level + 1] * (context.end - context.start)
        offset += len(context.slots)
    slots = [context.slots for context in layout.contexts]
    empty = torch.zeros(1, dtype=torch.int64, device=device)
    made = (
        torch.tensor(items, dtype=torch.int64, device=device),
        torch.cat(slots) if slots else empty,
        levels,
    )
    _work[layout] = made
    return made


def attention(
    q: Any, k: Any, v: Any, kp: Any, vp: Any, layout: Any, scale: float, window: int | None, softcap: float | None
) -> Any:
    """shared_prefix_attention by Triton; arguments as there, checked already."""
    T, heads, dim = q.shape
    kv_heads = k.shape[1]
    share = heads // kv_heads
    q, k, v, kp, vp = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v, kp, vp))
    items, slots, levels = _work_items(layout)
    parts = torch.empty((levels, T, heads, dim), dtype=torch.float32, device=q.device)
    lse = torch.full((levels, T, heads), float("-inf"), dtype=torch.float32, device=q.device)
    out = torch.empty((T, heads, dim), dtype=q.dtype, device=q.device)
    d_p = max(16, next_power_of_2(dim))
    _partial_kernel[(len(items), kv_heads)](
        q, k, v, kp, vp, slots, layout.positions, items, parts, lse,
        *(s for each in (q, k, v, kp, vp) for s in each.stride()[:2]), T,
        float(scale), window or 0, float(softcap or 1.0),
        HEADS=heads, SHARE=share, SHARE_P=next_power_of_2(share), D=dim, D_P=d_p,
        WINDOW=window is not None, SOFTCAP=softcap is not None, BLOCK_R=ROWS, BLOCK_N=BLOCK_N, COLUMNS=COLUMNS,
    )  # fmt: skip
    _merge_kernel[(T, heads)](parts, lse, out, T, HEADS=heads, D=dim, D_P=d_p, LEVELS=levels)
    return out
