"""The variants that Triton compiles: a small set of variants that does not depend on batches, all known to the warm-up.

A variant that a request meets first is compiled in the middle of serving (seconds).
"""

import itertools
from typing import Any

import pytest
import torch
from launches import recorded

from guiderail.kernels import _dispatch, reward_head, tilt_sample, token_logprobs
from guiderail.kernels.shared_prefix_attention import Context, Layout, shared_prefix_attention

pytest.importorskip("triton")


def attend(lengths: list[int], depth: int, heads: tuple[int, int], dim: int, **options: Any) -> None:
    """Candidates of these lengths beneath `depth` nested contexts."""
    total, (hq, hkv) = sum(lengths), heads
    edges = list(itertools.accumulate(lengths, initial=0))
    contexts = tuple(Context(0, total, torch.arange(3 * i, 3 * i + 3), 3 * i) for i in range(depth))
    positions = torch.cat([torch.arange(3 * depth, 3 * depth + length) for length in lengths])
    layout = Layout(tuple(itertools.pairwise(edges)), contexts, positions)
    q, k = torch.zeros(total, hq, dim, dtype=torch.bfloat16), torch.zeros(total, hkv, dim, dtype=torch.bfloat16)
    pool = torch.zeros(200, hkv, dim, dtype=torch.bfloat16)
    shared_prefix_attention(q, k, k, pool, pool, layout, **options)


BATCHES = [([1], 0), ([1], 1), ([16, 16], 1), ([1, 2, 3, 5, 40], 2), ([64] * 8, 3), ([7], 41), ([16], 16), ([129], 9)]


def test_attention_compiles_two_variants_for_a_head_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rows, the depth and the heads; a window adds one."""
    with recorded(monkeypatch) as launches:
        for (lengths, depth), heads in itertools.product(BATCHES, [(9, 3), (32, 8), (28, 4), (4, 1), (16, 1)]):
            attend(lengths, depth, heads, 64)
        assert len(set(launches)) == 2
        for (lengths, depth), window in itertools.product(BATCHES, (1, 16, 17, 4096)):
            attend(lengths, depth, (9, 3), 64, window=window)
        assert len(set(launches)) == 3
        attend([3], 1, (9, 3), 128)
        assert len(set(launches)) == 5  # the control: another head size is another kernel


def test_a_level_is_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(monkeypatch) as launches:
        attend([3, 4], 41, (4, 2), 64)
    assert len(launches) == 42


def test_sampling_compiles_one_variant_with_and_one_without_other_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(monkeypatch) as launches:
        for rows, other in itertools.product((1, 2, 3, 16, 17), (False, True)):
            logits, rest = torch.zeros(rows, 49152), torch.zeros(4, rows + 3)[:, 3:]  # not aligned
            alpha, temperature, uniform = rest[:3]
            dense = torch.zeros_like(logits) if other else None
            tilt_sample(logits, dense, alpha, temperature, uniform, validate=False)
    assert len(launches) == 20
    assert len(set(launches)) == 4


def test_other_kernels_do_not_depend_on_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, head = torch.zeros(1000, 64), torch.zeros(2, 64)
    with recorded(monkeypatch) as launches:
        for rows in (1, 2, 3, 16, 17, 100):
            hidden = torch.zeros(rows + 1, 64)
            reward_head(
                hidden, torch.zeros(rows + 1, dtype=torch.int64)[1:], torch.ones(64), 1e-5, head, validate=False
            )
        assert len(set(launches)) == 1
        for rows in (1, 2, 3, 16):
            token_logprobs(weight[:rows], weight, torch.zeros(rows, dtype=torch.int64), validate=False)
        assert len(set(launches)) == 2


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be another than the current one; the tensor stands for one of the second card."""
    entered: list[Any] = []
    current: list[Any] = [0]

    class Device:
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *error: Any) -> None:
            current.pop()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: entered.append((grid, current[-1], options))

    class Tensor(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]
        device = "cuda:1"  # type: ignore[assignment]

    monkeypatch.setattr(torch.cuda, "device", Device)
    _dispatch.launch(Kernel(), (3,), 5, torch.zeros(2).as_subclass(Tensor), num_warps=4)
    assert entered == [((3,), "cuda:1", {"num_warps": 4})]
    assert current == [0]


def test_no_kernel_is_launched_but_through_the_one_door() -> None:
    """A kernel that is called as kernel[grid](...) elsewhere would run on the current device."""
    from pathlib import Path

    folder = Path(_dispatch.__file__).parent
    for path in folder.glob("*.py"):
        if path.name != "_dispatch.py":
            assert "_kernel[" not in path.read_text(), path.name
