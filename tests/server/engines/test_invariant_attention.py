"""vLLM's attention on CPU without split keys: a token's bits do not depend on how its prompt was read, or on others."""

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

HEADS, KV_HEADS, SIZE, BLOCK, LENGTH = 9, 3, 64, 32, 200  # of SmolLM2-135M
PAGES = 10  # a sequence's, at most

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU build")


def attend(parts: list[tuple[int, int]], others: int = 0) -> torch.Tensor:
    """Attention [LENGTH, HEADS, SIZE] of a sequence read in `parts`, `others` of one token decoding beside each."""
    current_platform.import_kernels()
    random = torch.Generator().manual_seed(0)
    q = torch.randn(LENGTH, HEADS, SIZE, generator=random)
    k, v = torch.randn(2, LENGTH, KV_HEADS, SIZE, generator=random)
    pages = torch.randn(2 * PAGES, KV_HEADS, BLOCK, 2 * SIZE, generator=random)
    keys, values = pages.view(2 * PAGES, KV_HEADS, 2 * BLOCK, SIZE).chunk(2, dim=2)
    isa = _get_attn_isa(torch.float32, BLOCK, SIZE)
    table = torch.arange(PAGES, dtype=torch.int32)
    made = torch.empty_like(q)
    for start, stop in parts:
        slots = torch.arange(start, stop)
        ops.cpu_attn_reshape_and_cache(k[start:stop], v[start:stop], keys, values, slots, isa)
        query = torch.cat([q[start:stop], torch.randn(others, HEADS, SIZE, generator=random)])
        lengths = torch.tensor([stop, *(40 + 50 * i for i in range(others))], dtype=torch.int32)
        starts = torch.tensor([0, *(stop - start + i for i in range(others + 1))], dtype=torch.int32)
        out = torch.empty_like(query)
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths), num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=SIZE, seq_lens=lengths,
            dtype=torch.float32, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa,
            enable_kv_split=False,
        )  # fmt: skip
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=out, query_start_loc=starts, seq_lens=lengths,
            scale=SIZE**-0.5, causal=True, alibi_slopes=None, sliding_window=-1,
            block_table=torch.stack([table, *[table + PAGES] * others]), softcap=0, scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip
        made[start:stop] = out[: stop - start]
    return made


TOKEN_BY_TOKEN = [(i, i + 1) for i in range(LENGTH)]


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize(
    "parts",
    [[(0, LENGTH)], [(0, 64), (64, LENGTH)], [(0, 45), (45, 160), *TOKEN_BY_TOKEN[160:]], TOKEN_BY_TOKEN],
    ids=["whole", "a cached prefix", "preempted", "token by token"],
)
def test_attention_has_the_same_bits_however_a_prompt_is_read(parts: list[tuple[int, int]], others: int) -> None:
    expected = attend([(0, LENGTH)])
    assert torch.equal(attend(parts, others), expected)
    assert not torch.equal(expected[1:], expected[:-1])
