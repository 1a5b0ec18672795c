"""shared_prefix_attention on a GPU against SDPA and FlexAttention: `.venv/bin/python -P tests/bench/bench_shared_prefix_attention.py`.

The work charged is what the problem demands: each candidate row against its prefix and, causally, itself.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from gpu_common import Table, limits, require_cuda
from report import write_section

from guiderail.kernels import shared_prefix_attention
from guiderail.kernels.shared_prefix_attention import Context, Layout

CASES = [  # groups, prefix, candidates, length, query heads, KV heads, head size
    (1, 400, 16, 64, 9, 3, 64),
    (1, 2048, 64, 128, 32, 8, 128),
    (8, 1024, 16, 64, 32, 8, 128),
    (1, 4096, 16, 8, 32, 8, 128),
]


def main() -> None:
    """Times every case and writes its section."""
    require_cuda()
    table = Table(limits())
    for case in CASES:
        one_case(table, *case)
    command = ".venv/bin/python -P tests/bench/bench_shared_prefix_attention.py"
    write_section("kernel_shared_prefix_attention", "Kernel: shared_prefix_attention", command, table.lines, table.data)


def one_case(table: Table, groups: int, prefix: int, count: int, length: int, hq: int, hkv: int, dim: int) -> None:
    """All variants on one layout, in bfloat16; checks that they agree before timing them."""

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    rows = groups * count * length
    q, k, v = draw(rows, hq, dim), draw(rows, hkv, dim), draw(rows, hkv, dim)
    kp, vp = draw(groups * prefix, hkv, dim), draw(groups * prefix, hkv, dim)
    slots = torch.arange(groups * prefix, device="cuda").view(groups, prefix)
    segments = tuple((i * length, (i + 1) * length) for i in range(groups * count))
    share = count * length
    contexts = tuple(Context(g * share, (g + 1) * share, slots[g], 0) for g in range(groups))
    positions = torch.arange(prefix, prefix + length, device="cuda").repeat(groups * count)
    layout = Layout(segments, contexts, positions)

    # SDPA: every candidate is a batch row with its own copy of the prefix, causal at the lower right.
    batch = groups * count

    def expand(pool: Any, own: Any) -> Any:
        copies = pool.view(groups, 1, prefix, hkv, dim).expand(-1, count, -1, -1, -1).reshape(batch, prefix, hkv, dim)
        return torch.cat([copies, own.view(batch, length, hkv, dim)], 1).transpose(1, 2)

    keys, values = expand(kp, k), expand(vp, v)
    queries = q.view(batch, length, hq, dim).transpose(1, 2)
    from torch.nn.attention.bias import causal_lower_right

    mask = causal_lower_right(length, prefix + length)

    def sdpa() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)

    variants = {
        "guiderail": lambda: shared_prefix_attention(q, k, v, kp, vp, layout),
        "SDPA, prefix copied to every candidate": sdpa,
        "FlexAttention over one flat row": flex(q, k, v, kp, vp, groups, prefix, count, length),
    }
    wanted = sdpa().transpose(1, 2).reshape(rows, hq, dim).float()
    for name, call in variants.items():
        if name.startswith("SDPA"):
            continue
        got = call()
        got = got if got.dim() == 3 else got[0].transpose(0, 1)
        error = (got.float() - wanted).abs().max().item()
        if error > 0.05:
            raise SystemExit(f"{name} differs from SDPA by {error}")
    pairs = rows * prefix + batch * length * (length + 1) // 2
    title = f"{groups} x [{prefix} | {count} x {length}], {hq}/{hkv} heads of {dim}"
    table.case(title, variants, flops=4.0 * pairs * hq * dim)


def flex(q: Any, k: Any, v: Any, kp: Any, vp: Any, groups: int, prefix: int, count: int, length: int) -> Any:
    """FlexAttention with the sharing as a block mask: keys are all prefixes, then all candidates."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    edge, share = groups * prefix, count * length

    def visible(b: Any, h: Any, row: Any, key: Any) -> Any:
        own = key - edge
        in_prefix = (key < edge) & (key // prefix == row // share)
        return in_prefix | ((key >= edge) & (own // length == row // length) & (own <= row))

    rows = q.shape[0]
    mask = create_block_mask(visible, None, None, rows, edge + rows, device="cuda")
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q, torch.cat([kp, k]), torch.cat([vp, v])))
    compiled = torch.compile(flex_attention)
    return lambda: compiled(queries, keys, values, block_mask=mask, enable_gqa=True)


if __name__ == "__main__":
    main()
