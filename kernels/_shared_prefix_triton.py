# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton path of shared_prefix_attention: a running softmax for each row, carried on level by level.

One program takes a tile of query rows with all the query heads of one KV head (m = row, head), and one range of keys:
a context, or last of all the tile's own segment (causal). It goes on from what the levels before left in `acc` and
`lse` of its rows, so there is nothing to merge and memory does not grow with the depth of the tree. The keys of a
context are read once for a tile of rows of all candidates beneath it. Exponentials are of base 2: log2(e) is in the
scale, and `lse` is log2 of the sum.

Sizes that differ between models and batches are run-time numbers, except for the head size: a model compiles two
variants (contexts, segments), and one more where it has layers with a window beside layers without.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from guiderail.kernels._dispatch import LARGE_SHARED_MEMORY, jit, launch, next_power_of_2, shared_memory_of, tl
from guiderail.kernels.prefix_layout import COLUMNS, Layout, on_device, work_items

NO_WINDOW = 2**30  # more than any position


class Tile(NamedTuple):
    """Lanes (rows times heads of a group) and keys of a block, warps of a program, and stages of its loads."""

    lanes: int
    keys: int
    warps: int
    stages: int


def tile_for(dim: int, element_size: int, shared_memory: int) -> Tile:
    """Return the largest tile that spills no register: see the table of registers in BENCHMARKS.md (float32 spills)."""
    if element_size == 4:
        return Tile(32, 32, 8, 1 if dim > 128 else 2)
    large = shared_memory >= LARGE_SHARED_MEMORY
    if dim > 128:
        return Tile(64, 64 if large else 32, 8, 2)
    if dim <= 64:
        return Tile(128, 64, 8, 2)  # with 3 stages B200 spills in Triton 3.9.0, under a window and a soft-cap
    return Tile(128, 64 if large else 32, 8, 3)


@jit
def _block(
    q, k_ptr, v_ptr, index, key_row, seen, top, total, acc, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
):  # fmt: skip
    """Take in one block of keys for all lanes: return the softmax's new maximum, sum and weighted values."""
    d = tl.arange(0, D_P)
    at = index.to(tl.int64)[:, None] * key_row + d[None, :]
    if D == D_P:
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
    else:
        k = tl.load(k_ptr + at, mask=(d < D)[None, :], other=0.0)
        v = tl.load(v_ptr + at, mask=(d < D)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores)))  # tanh: scale has the 2 / softcap
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # lanes that have seen nothing yet
    p = tl.exp2(scores - safe[:, None])  # a NaN is passed over by the maximum and stays in the sum
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@jit(varying=("heads", "kv_heads", "window"))
def _level_kernel(
    q_ptr, k_ptr, v_ptr, slots_ptr, positions_ptr, items_ptr, acc_ptr, lse_ptr, out_ptr,
    heads, kv_heads, window, scale, softcap,
    OWN: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    LANES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: one work item and one KV head. OWN: k and v are the batch's own rows and `out` is written;
    else they are the pool, read at the slots, and `acc` and `lse` are written. WINDOW is for contexts alone."""
    item = items_ptr + tl.program_id(0) * COLUMNS
    kv_head = tl.program_id(1)
    share = heads // kv_heads
    row_start, row_end = tl.load(item), tl.load(item + 1)
    first_key, n_keys, first_position = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    m = tl.arange(0, LANES)
    row = row_start + m // share
    valid = row < row_end
    place = row.to(tl.int64) * heads + kv_head * share + m % share
    d = tl.arange(0, D_P)
    grid = place[:, None] * D + d[None, :]
    inner = valid[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + grid, mask=inner, other=0.0)
    at = tl.load(positions_ptr + row, mask=valid, other=0) - first_position  # may be in none of these keys
    top = tl.load(lse_ptr + place, mask=valid, other=float("-inf"))
    started = top != float("-inf")  # true for NaN
    total = tl.where(started, 1.0, 0.0)
    acc = tl.load(acc_ptr + grid, mask=inner & started[:, None], other=0.0)
    k_ptr += kv_head * D
    v_ptr += kv_head * D
    key_row = kv_heads * D
    whole = 0
    if WINDOW:  # blocks that all rows of the tile have left behind are passed over
        lowest = tl.min(tl.where(valid, at, 2147483647), 0) - window + 1
        whole = tl.maximum(lowest, 0) // KEYS * KEYS
    elif not OWN:  # blocks that need no mask
        whole = n_keys // KEYS * KEYS
        for start in tl.range(0, whole, KEYS, num_stages=STAGES):
            index = tl.load(slots_ptr + first_key + start + tl.arange(0, KEYS))
            top, total, acc = _block(
                q, k_ptr, v_ptr, index, key_row, True, top, total, acc, scale, softcap, False, SOFTCAP, D, D_P
            )
    for start in tl.range(whole, n_keys, KEYS, num_stages=STAGES if OWN or WINDOW else 1):
        n = start + tl.arange(0, KEYS)
        near = tl.minimum(n, n_keys - 1)  # a load without a mask; what lies beyond is not seen
        if OWN:
            index = first_key + near
            seen = (n[None, :] <= at[:, None]) & (n[None, :] > (at - window)[:, None])
        else:
            index = tl.load(slots_ptr + first_key + near)
            seen = (n < n_keys)[None, :]
            if WINDOW:
                seen = seen & (n[None, :] > (at - window)[:, None])
        top, total, acc = _block(
            q, k_ptr, v_ptr, index, key_row, seen, top, total, acc, scale, softcap, True, SOFTCAP, D, D_P
        )
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if OWN:
        tl.store(out_ptr + grid, out.to(out_ptr.dtype.element_ty), mask=inner)
    else:
        tl.store(acc_ptr + grid, out, mask=inner)
        tl.store(lse_ptr + place, tl.where(total == 0.0, float("-inf"), top + tl.log2(total)), mask=valid)


class Tables(NamedTuple):
    """A layout on a device, for tiles of so many rows: work items of each level, slots and positions, int32."""

    levels: list[Any]
    slots: Any
    positions: Any


_placed: "WeakKeyDictionary[Layout, dict[tuple[int, Any], Tables]]" = WeakKeyDictionary()


def _tile(heads: int, kv_heads: int, dim: int, like: Any) -> tuple[Tile, int]:
    """Return the tile and its query rows."""
    share = heads // kv_heads
    tile = tile_for(dim, like.element_size(), shared_memory_of(like))
    tile = tile._replace(lanes=max(tile.lanes, next_power_of_2(share)))
    return tile, tile.lanes // share


def place(layout: Layout, heads: int, pool: Any, beside: Sequence[Any] = ()) -> list[Any]:
    """Do what shared_prefix_attention.prepare does."""
    _, rows = _tile(heads, pool.shape[1], pool.shape[2], pool)
    levels, slots = work_items(layout, rows)
    positions = layout.positions.cpu().numpy().astype("int32")
    made = on_device([*levels, slots, positions, *beside], pool.device)
    count = len(levels)
    _placed.setdefault(layout, {})[rows, pool.device] = Tables(made[:count], made[count], made[count + 1])
    return made[count + 2 :]


def attention(
    q: Any, k: Any, v: Any, kp: Any, vp: Any, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Any:
    """Compute shared_prefix_attention by Triton; arguments as there, checked already."""
    T, heads, dim = q.shape
    kv_heads = k.shape[1]
    q, k, v, kp, vp = (each.contiguous() for each in (q, k, v, kp, vp))
    out = torch.empty_like(q)
    if T == 0:
        return out
    tile, rows = _tile(heads, kv_heads, dim, kp)
    if (rows, kp.device) not in _placed.get(layout, {}):
        place(layout, heads, kp)
    tables = _placed[layout][rows, kp.device]
    acc = torch.empty(q.shape if layout.contexts else (1,), dtype=torch.float32, device=q.device)
    lse = torch.full((T, heads), float("-inf"), dtype=torch.float32, device=q.device)
    factor = scale * math.log2(math.e)
    for level, items in enumerate(tables.levels):
        own = level == len(tables.levels) - 1
        launch(
            _level_kernel, (len(items), kv_heads),
            q, *((k, v) if own else (kp, vp)), tables.slots, tables.positions, items, acc, lse, out,
            heads, kv_heads, NO_WINDOW if window is None else min(window, NO_WINDOW),
            factor if softcap is None else 2 * factor / softcap, (softcap or 0.0) * math.log2(math.e),
            OWN=own, WINDOW=window is not None and not own, SOFTCAP=softcap is not None,
            D=dim, D_P=max(16, next_power_of_2(dim)),
            LANES=tile.lanes, KEYS=tile.keys, STAGES=tile.stages, COLUMNS=COLUMNS, num_warps=tile.warps,
        )  # fmt: skip
    return out
