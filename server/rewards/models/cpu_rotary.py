"""Rotary position embedding of a transformers decoder in one native pass over queries and keys, on CPU.

transformers' attention modules call a function `apply_rotary_pos_emb` of their own file. Those of one decoder get
a forward that finds ours under this name instead; no other model of the process is touched. Rounding differs only.
"""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch

from guiderail.server.engines.vllm.native_ops import MULTIPLE

NAME = "apply_rotary_pos_emb"


class FastRotary:
    """q, k [1, H, T, D] turned by angles in cos, sin [1, T, D] of two equal halves (Su et al. 2021, eq. 34)."""

    def __init__(self, ops: Any, original: Callable[..., Any]) -> None:
        """ops: see native_ops.native_ops. original: used for shapes that the native operation does not take."""
        self._ops, self._original = ops, original
        self._cos: Any = None
        self._table: Any = None
        self._rows: Any = None

    def __call__(self, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        _, _, rows, dim = q.shape
        shape = (1, rows, dim)
        if cos.shape != shape or len(q) != 1 or dim % MULTIPLE or unsqueeze_dim != 1 or cos.dtype != q.dtype:
            return self._original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        if cos is not self._cos:  # all layers of a pass get the same tensors
            half = dim // 2
            self._cos, self._table = cos, torch.cat([cos[0, :, :half], sin[0, :, :half]], -1)
            self._rows = torch.arange(rows)
        flat = [each[0].transpose(0, 1).flatten(1) for each in (q, k)]  # [T, H * D], a view where memory allows it
        self._ops.rotary_embedding(self._rows, flat[0], flat[1], dim, self._table, True)  # in place
        turned = [each.unflatten(-1, (-1, dim)).transpose(0, 1)[None] for each in flat]
        return turned[0], turned[1]


def speed_up_rotary(model: Any, ops: Any) -> None:
    """Give the model's attention modules the native operation where theirs does the same."""
    made: dict[Any, Any] = {}  # one for all layers, so that they share a pass's table
    for module in model.modules():
        plain = type(module).forward
        if not isinstance(plain, FunctionType) or NAME not in plain.__code__.co_names or NAME not in plain.__globals__:
            continue
        original = plain.__globals__[NAME]
        if original not in made:
            fast = FastRotary(ops, original)
            made[original] = fast if _same(fast, original) else None
        if made[original] is not None:
            names = {**plain.__globals__, NAME: made[original]}
            forward = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
            forward.__kwdefaults__ = plain.__kwdefaults__
            module.forward = MethodType(forward, module)


def _same(fast: FastRotary, original: Callable[..., Any]) -> bool:
    """Return True if a function turns vectors as FastRotary does: some models pair neighbours instead of halves."""
    draw = torch.Generator().manual_seed(0)
    angles = torch.rand(1, 3, 32, generator=draw).repeat(1, 1, 2)
    q, k = (torch.randn(1, heads, 3, 64, generator=draw) for heads in (4, 2))
    try:
        wanted = original(q.clone(), k.clone(), angles.cos(), angles.sin())
        got = fast(q, k, angles.cos(), angles.sin())
    except (TypeError, RuntimeError):  # another signature
        return False
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, got, strict=True))
