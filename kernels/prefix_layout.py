"""Places of the rows of a batch that shares prefixes: segments, contexts above them, and the kernel's work items.

A layout is made and kept on the host, which knows all of it; a device gets one copy of what it needs, from pinned
memory, which nothing waits for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ALIGNMENT = 128  # bytes; Triton compiles anew for pointers that are not aligned to 16


@dataclass(frozen=True, eq=False)
class Context:
    """Pool rows `slots` [C] int64, at positions first_position.., seen by query rows start..end-1."""

    start: int
    end: int
    slots: Any
    first_position: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Places of a batch's rows. Make one per batch; all layers use it.

    segments: (start, end) rows of each segment, in order, covering all rows.
    contexts: the tokens that segments see above themselves.
    positions: [T] int64, position of each row in its own sequence.

    Tensors belong on the CPU: those elsewhere are copied back first, which waits for their device.
    """

    segments: tuple[tuple[int, int], ...]
    contexts: tuple[Context, ...]
    positions: Any

    def __post_init__(self) -> None:
        edges = [0]
        for start, end in self.segments:
            if start != edges[-1] or end <= start:
                raise ValueError(f"segments must cover the rows in order, without gaps or empty ones: {self.segments}")
            edges.append(end)
        if self.positions.shape != (edges[-1],):
            raise ValueError(f"positions must have shape ({edges[-1]},), not {tuple(self.positions.shape)}")
        for context in self.contexts:
            if not 0 <= context.start < context.end <= edges[-1] or len(context.slots) == 0:
                raise ValueError(f"context {context.start}..{context.end} lies outside the rows or is empty")


COLUMNS = 5  # of a work item: row start, row end, first key, keys, position of the first key


def work_items(layout: Layout, rows: int) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Return (items of each level [I, COLUMNS], slots of all contexts [C]), int32; at most `rows` query rows an item.

    The last level is the segments among themselves. The others are the contexts: those of one level have no row in
    common, so that work items of a level may update their rows' softmax at the same time.
    """
    levels: list[list[tuple[int, ...]]] = []
    depth = np.zeros(layout.segments[-1][1] if layout.segments else 0, np.int64)  # the next free level of each row
    first_key = 0
    for context in layout.contexts:
        level = int(depth[context.start : context.end].max())
        if level == len(levels):
            levels.append([])
        depth[context.start : context.end] = level + 1
        for row in range(context.start, context.end, rows):
            end = min(row + rows, context.end)
            levels[level].append((row, end, first_key, len(context.slots), context.first_position))
        first_key += len(context.slots)
    positions = layout.positions.cpu().numpy()
    own = []
    for start, end in layout.segments:
        for row in range(start, end, rows):
            last = min(row + rows, end)
            own.append((row, last, start, last - start, int(positions[start])))
    slots = [context.slots.cpu().numpy() for context in layout.contexts]
    joined = np.concatenate(slots).astype(np.int32) if slots else np.zeros(1, np.int32)
    return [np.array(each, np.int32) for each in (*levels, own)], joined


def on_device(arrays: Sequence[np.ndarray[Any, Any]], device: Any) -> list[Any]:
    """Return the arrays as tensors on a device, by one copy that the host does not wait for."""
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    target = staged.numpy()
    for start, array in zip(starts, arrays, strict=True):
        target[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = staged.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(torch.from_numpy(array[:0].reshape(-1)).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]
