"""The peers of gpu_check.py compute the same as our kernels, as far as that shows without a card."""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from gpu_peers import Decode, cascade, expanded, padded

from guiderail.kernels.shared_prefix_attention import Context, Layout, shared_prefix_attention
from guiderail.server.rewards.models.packed import PackedRunner


def attend(q: Any, k: Any, v: Any, q_edges: list[int], k_edges: list[int], causal: bool) -> tuple[Any, Any]:
    """As gpu_peers.flash, written out."""
    parts, sums = [], []
    for (a, b), (c, d) in zip(itertools.pairwise(q_edges), itertools.pairwise(k_edges), strict=True):
        keys, values = (each[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        scores = torch.einsum("nhd,chd->hnc", q[a:b], keys) * q.shape[2] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(b - a, d - c).triu(1).bool(), -math.inf)
        parts.append(torch.einsum("hnc,chd->nhd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    return torch.cat(parts), torch.cat(sums, 1)


def test_the_cascade_is_shared_prefix_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(10, heads, 16, generator=generator) for heads in (6, 2, 2))
    kp, vp = (torch.randn(40, 2, 16, generator=generator) for _ in range(2))
    places = torch.randperm(40, generator=generator)
    contexts = Context(0, 10, places[:9], 0), Context(2, 10, places[9:14], 9)
    positions = torch.tensor([9, 10, 14, 15, 16, 14, 14, 15, 16, 17])
    layout = Layout(((0, 2), (2, 5), (5, 6), (6, 10)), contexts, positions)
    made, wanted = cascade(q, k, v, kp, vp, layout, attend), shared_prefix_attention(q, k, v, kp, vp, layout)
    assert (made - wanted).abs().max() < 2e-6
    without = cascade(q, k, v, kp, vp, Layout(layout.segments, contexts[:1], positions), attend)
    assert (without - wanted)[2:].abs().max() > 0.1  # the control: each context counts


def test_transformers_scores_what_the_runner_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole sequences of unequal lengths, and ends after a prompt, in several batches."""
    from transformers import AutoModel, LlamaConfig

    monkeypatch.setattr(sys.modules[padded.__module__], "ROWS", 50)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModel.from_config(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=100)).float().eval()
    heads, prompt = torch.randn(2, 64), list(range(20))
    ends = [[each, 5, each + 7, 9] for each in range(15)]
    equal, unequal = [prompt + end for end in ends], [[*prompt[: 5 + i], *end] for i, end in enumerate(ends)]
    whole, shorter, after = (
        padded(model, heads, equal),
        padded(model, heads, unequal),
        expanded(model, heads, prompt, ends),
    )
    again = after(), after()
    runner = PackedRunner(model, heads, capacity=500)
    wanted = runner.score(equal)
    assert all((each - wanted).abs().max() < 1e-4 for each in (whole, *again))
    assert (shorter - runner.score(unequal)).abs().max() < 1e-4
    assert wanted.std(0).min() > 0.1  # which would pass for equal scores, too


def test_a_step_of_the_decode_is_the_same_each_time() -> None:
    """As it is replayed; and it reads the keys that it keeps."""
    torch.manual_seed(0)
    decode = Decode(3, 10, layers=2, width=512, device="cpu")
    first = decode.step()
    assert torch.equal(first, decode.step())
    decode.kept[1][1][:, :, :5] += 1
    assert not torch.equal(first, decode.step())
