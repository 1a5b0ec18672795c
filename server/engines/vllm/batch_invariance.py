"""Batch invariance: a sequence gets the same bits whatever runs beside it.

On CUDA it is vLLM's own mode. On CPU, in float32, two operations depend on the batch (measured one by one): attention,
which vLLM splits over a long context's keys when threads would idle, so that a sequence alone is summed in another
order than one beside others; and matrix products, which oneDNN may block by the number of rows. The split is turned
off. Products are checked on the processor at hand when the engine starts, with one row in every place of steps of
several sizes. Those that fail are computed in blocks of one size; if that fails too, the engine does not start. With
that, attention gives the same for cached and fresh keys, whether a prompt is prefilled whole or token by token.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIZES = (2, 3, 8, 16, 31, 64, 128)  # rows of the steps that are compared with a row alone
BLOCK = 32  # rows of a block where a product is not the same in all of them
CPU, GPU = {"VLLM_CPU_ATTN_SPLIT_KV": "0"}, {"VLLM_BATCH_INVARIANT": "1"}

Product = Callable[[Any, Any, Any], Any]  # x [N, K], weight, bias -> [N, M]


@contextmanager
def invariant_environment(*, cpu: bool) -> Iterator[None]:
    """Set what vLLM's processes read from the environment, while they start."""
    wanted = CPU if cpu else GPU
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def make_products_invariant(model: Any) -> list[str]:
    """Make a model's products on CPU the same for a row in any step; return the layers for which that failed.

    Layers of one shape have one product, so one of them is checked for all.
    """
    import torch

    faults: list[str] = []
    blocked: dict[tuple[int, int], bool] = {}  # by width and height
    for name, layer in model.named_modules():
        if (product := getattr(layer, "cpu_linear", None)) is None:
            continue
        width = next(
            getattr(layer, size)
            for size in ("input_size_per_partition", "input_size", "embedding_dim")
            if hasattr(layer, size)
        )
        row = torch.randn(width, generator=torch.Generator().manual_seed(0))
        shape = (width, product(row[None], layer.weight, None).shape[1])
        if shape not in blocked:
            blocked[shape] = not same_in_all_steps(product, layer.weight, row)
            if blocked[shape] and not same_in_all_steps(in_blocks(product), layer.weight, row):
                faults.append(name)
        if blocked[shape]:
            layer.cpu_linear = in_blocks(product)
    return faults


def same_in_all_steps(product: Product, weight: Any, row: Any) -> bool:
    """Return True if `row` [K] gives the same bits alone and in every place of larger steps."""
    alone = product(row[None], weight, None)
    return all(bool((product(row.expand(size, -1).contiguous(), weight, None) == alone).all()) for size in SIZES)


def in_blocks(product: Product) -> Product:
    """Return the product computed in blocks of BLOCK rows, the last padded with zeros."""
    import torch

    def blocks(x: Any, weight: Any, bias: Any) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        padded = torch.nn.functional.pad(flat, (0, 0, 0, -len(flat) % BLOCK))
        made = torch.cat([product(block, weight, bias) for block in padded.split(BLOCK)])
        return made[: len(flat)].reshape(*x.shape[:-1], -1)

    return blocks
