"""Rows of logits and groups over them, for tests of mixed policies."""

from typing import Any

import torch

from guiderail.server.engines.vllm.mixture.mixing import Row, draw
from guiderail.server.engines.vllm.mixture.recipe import Recipe

V = 12


def policies(n: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    """Logits of n policies."""
    return scale * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


def group(rows: list[int], position: int = 0, name: str = "g", **recipe: Any) -> list[Row]:
    """The rows of a group, in step at `position`."""
    heads = [Recipe(name, 0, len(rows), **({"weights": [1.0] * (len(rows) - 1)} | recipe))]
    heads += [Recipe(name, role, len(rows)) for role in range(1, len(rows))]
    return [Row(row, head, position) for row, head in zip(rows, heads, strict=True)]


def emitted(logits: torch.Tensor) -> list[int | None]:
    """The one token left of each row; None where a row was not touched."""
    return [int(row.argmax()) if (row > -torch.inf).sum() == 1 else None for row in logits]


def drawn(logits: torch.Tensor, rows: list[int], place: int, **recipe: Any) -> int:
    return int(draw(logits, [group(rows, place, **({"seed": 4} | recipe))])[0])
