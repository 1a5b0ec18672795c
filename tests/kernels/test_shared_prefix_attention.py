"""shared_prefix_attention: torch and Triton paths against a float64 reference that knows each row's sequence."""

import itertools
import math
import sys
from typing import Any

import pytest
import torch
from kernel_checks import on_path
from launches import recorded
from torch.utils._python_dispatch import TorchDispatchMode

from guiderail.kernels.shared_prefix_attention import Context, Layout, shared_prefix_attention

FULL = torch.ops.aten.full.default
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Case:
    """A tree of segments over random tensors: `cached` contexts lie in the pool only, new segments in both."""

    def __init__(
        self,
        lengths: list[int],
        cached: list[int],
        tree: list[tuple[int, int, list[int]]],
        heads: tuple[int, int],
        dim: int,
        dtype: Any,
        device: str = "cpu",
    ) -> None:
        """tree: (segment start, segment end, what is above: indices of cached contexts, or -1-s for segment s)."""
        generator = torch.Generator().manual_seed(sum(lengths) + dim)

        def draw(*shape: int) -> Any:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        total, (hq, hkv) = sum(lengths), heads
        self.q, self.k, self.v = draw(total, hq, dim), draw(total, hkv, dim), draw(total, hkv, dim)
        pool = sum(cached) + total + 3
        self.kp, self.vp = draw(pool, hkv, dim), draw(pool, hkv, dim)
        places = torch.randperm(pool, generator=generator)
        edges = [0]
        for length in lengths:
            edges.append(edges[-1] + length)
        slots = [places[sum(cached[:i]) : sum(cached[: i + 1])].to(device) for i in range(len(cached))]
        own = [places[sum(cached) + a : sum(cached) + b].to(device) for a, b in itertools.pairwise(edges)]
        for rows, (a, b) in zip(own, itertools.pairwise(edges), strict=True):
            self.kp[rows], self.vp[rows] = self.k[a:b], self.v[a:b]
        positions = torch.zeros(total, dtype=torch.int64)
        above: list[list[Any]] = []
        for s, (_, _, parents) in enumerate(tree):
            chain = [slots[p] if p >= 0 else own[-1 - p] for p in parents]
            above.append(chain)
            start = sum(len(c) for c in chain)
            positions[edges[s] : edges[s + 1]] = torch.arange(start, start + lengths[s])
        self.positions = positions.to(device)
        self.above, self.edges = above, edges
        contexts: dict[tuple[int, ...], list[int]] = {}
        for s, (_, _, parents) in enumerate(tree):
            for depth in range(1, len(parents) + 1):
                contexts.setdefault(tuple(parents[:depth]), []).append(s)
        made = []
        for key, below in sorted(contexts.items(), key=lambda item: (item[1][0], len(item[0]))):
            chain = [slots[p] if p >= 0 else own[-1 - p] for p in key]
            made.append(Context(edges[below[0]], edges[below[-1] + 1], chain[-1], sum(len(c) for c in chain[:-1])))
        self.layout = Layout(tuple(itertools.pairwise(edges)), tuple(made), self.positions)

    def run(self, **options: Any) -> Any:
        return shared_prefix_attention(self.q, self.k, self.v, self.kp, self.vp, self.layout, **options)

    def reference(self, *, scale: float | None = None, window: int | None = None, softcap: float | None = None) -> Any:
        """Segment by segment, over the whole sequence written out, in float64."""
        hq, hkv = self.q.shape[1], self.k.shape[1]
        scale = scale or self.q.shape[2] ** -0.5
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for s, chain in enumerate(self.above):
            a, b = self.edges[s], self.edges[s + 1]
            keys = torch.cat([*(self.kp[c] for c in chain), self.k[a:b]]).double().cpu().repeat_interleave(hq // hkv, 1)
            values = (
                torch.cat([*(self.vp[c] for c in chain), self.v[a:b]]).double().cpu().repeat_interleave(hq // hkv, 1)
            )
            at = self.positions[a:b].cpu()[:, None]
            where = torch.arange(len(keys))[None, :]
            hidden = where > at
            if window is not None:
                hidden = hidden | (where <= at - window)
            scores = torch.einsum("nhd,chd->hnc", self.q[a:b].double().cpu(), keys) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[a:b] = torch.einsum("hnc,chd->nhd", torch.softmax(scores.masked_fill(hidden, -math.inf), -1), values)
        return out


def shapes(dtype: Any, device: str = "cpu") -> dict[str, Case]:
    return {
        "one candidate": Case([5], [17], [(0, 5, [0])], (2, 1), 16, dtype, device),
        "no prefix": Case([1, 17], [], [(0, 1, []), (1, 18, [])], (3, 3), 8, dtype, device),
        "unequal candidates": Case([1, 17, 70, 3], [40], [(0, 0, [0])] * 4, (9, 3), 64, dtype, device),
        "prefix in the batch": Case([33, 5, 5, 9], [], [(0, 0, []), *[(0, 0, [-1])] * 3], (4, 2), 32, dtype, device),
        "two groups": Case([4, 4, 7], [20, 1], [(0, 0, [0]), (0, 0, [0]), (0, 0, [1])], (2, 2), 24, dtype, device),
        "deep tree": Case(
            [6, 3, 2, 8, 1], [19], [(0, 0, [0]), (0, 0, [0, -1]), (0, 0, [0, -1, -2]), (0, 0, [0, -1]), (0, 0, [0])], (6, 2), 16, dtype, device
        ),
    }  # fmt: skip


def compare(case: Case, **options: Any) -> None:
    got, wanted = case.run(**options), case.reference(**options)
    assert got.dtype == case.q.dtype
    assert torch.isfinite(got).all()
    error = (got.double().cpu() - wanted).abs().max().item()
    assert error < TOLERANCE[case.q.dtype], error


OPTIONS: list[dict[str, Any]] = [{}, {"window": 7}, {"softcap": 5.0}, {"scale": 0.5, "window": 30, "softcap": 20.0}]
NAMES = list(shapes(torch.float32))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_path(name: str, dtype: Any, options: dict[str, Any]) -> None:
    compare(shapes(dtype)[name], **options)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_path_interpreted(name: str, dtype: Any, options: dict[str, Any]) -> None:
    with on_path("triton"):
        compare(shapes(dtype)[name], **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_triton_path_on_gpu(name: str, dtype: Any, options: dict[str, Any]) -> None:
    compare(shapes(dtype, "cuda")[name], **options)


@pytest.fixture(params=[True, False], ids=["plain products", "fused"])
def large_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute large bfloat16 blocks, whichever this machine's processor would choose."""
    monkeypatch.setattr(sys.modules[shared_prefix_attention.__module__], "PLAIN_PRODUCTS", request.param)


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("size", [1.0, 12.0, 200.0])
def test_large_bfloat16_blocks_on_cpu(size: float) -> None:
    """Ordinary sizes, and scores that are too large for the plain products, which then leave them to the others."""
    case = Case([128] * 6, [200], [(0, 0, [0])] * 6, (6, 2), 32, torch.bfloat16)
    case.q *= size
    got, wanted = case.run(), case.reference()
    assert torch.isfinite(got).all()
    # Scores of magnitude |s| are rounded by |s| / 256, which changes weights by as much, relatively.
    assert (got.double() - wanted).abs().max() < 0.05 * max(1.0, size**0.5)


@pytest.mark.usefixtures("large_blocks")
def test_large_segments_that_do_not_lie_side_by_side() -> None:
    """Equal segments that have others between them."""
    case = Case([200, 3, 200], [20], [(0, 0, [0])] * 3, (6, 2), 32, torch.bfloat16)
    compare(case)


def test_a_wrong_prefix_is_noticed() -> None:
    """The control: what the tests compare does depend on the prefix."""
    case = shapes(torch.float32)["unequal candidates"]
    wanted = case.reference()
    case.vp.mul_(-1)
    assert (case.run().double() - wanted).abs().max() > 0.1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pool", ["kp", "vp"])
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_a_nan_reaches_the_rows_that_see_it_and_no_others(path: Any, pool: str, options: dict[str, Any]) -> None:
    """A NaN among kept keys or values makes the scores NaN, which the finite check then refuses, on both paths."""
    case = shapes(torch.float32)["two groups"]
    getattr(case, pool)[case.layout.contexts[1].slots[0]] = math.nan  # the second group's prefix
    with on_path(path):
        got = case.run(**options)
    assert torch.isfinite(got[:8]).all()
    first = got[8]  # the nearest row, which sees it with every window
    assert torch.isnan(first).all()
    if not options:
        assert torch.isnan(got[8:]).all()


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_nan_among_the_new_rows_is_kept(path: Any, where: str) -> None:
    """Also where it is all that a row sees: a segment's first row sees one key."""
    case = shapes(torch.float32)["no prefix"]
    getattr(case, where)[1] = math.nan
    with on_path(path):
        got = case.run()
    assert torch.isnan(got[1]).all()
    assert torch.isfinite(got[0]).all()


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("levels", ["above", "beneath"])
def test_a_nan_is_kept_by_the_levels_that_follow(path: Any, levels: str) -> None:
    """A NaN in the first of three contexts, or in the last."""
    case = shapes(torch.float32)["deep tree"]
    reached = case.layout.contexts[0 if levels == "above" else 2]
    case.kp[reached.slots[-1]] = math.nan
    with on_path(path):
        got = case.run()
    assert torch.isnan(got[reached.start : reached.end]).all()
    others = [i for i in range(len(got)) if not reached.start <= i < reached.end]
    assert torch.isfinite(got[others]).all()


def nested(depth: int, dtype: Any = torch.float32) -> Case:
    """A path of `depth` cached contexts of 1 to 4 tokens, with two candidates at its end."""
    lengths = [1 + i % 4 for i in range(depth)]
    return Case([3, 5], lengths, [(0, 0, list(range(depth)))] * 2, (4, 2), 16, dtype)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_forty_one_nested_steps(path: Any) -> None:
    with on_path(path):
        compare(nested(41))


def test_memory_does_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements that the Triton path allocates, counted at 1, 8 and 41 levels."""

    def allocated(case: Case) -> int:
        found = 0

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal found
                out = func(*args, **(kwargs or {}))
                if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, FULL):
                    found += out.numel() if out.is_floating_point() else 0
                return out

        with recorded(monkeypatch) as launches, Count():
            case.run()
        assert len(launches) == len(case.layout.contexts) + 1
        return found

    rows, heads, dim = nested(1).q.shape
    counts = [allocated(nested(depth)) for depth in (1, 8, 41)]
    assert counts == [2 * rows * heads * dim + rows * heads] * 3  # the output, and running values and sums of each row


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """A candidate alone and among others, in float32, to rounding."""
    together = shapes(torch.float32)["unequal candidates"]
    alone = shapes(torch.float32)["unequal candidates"]
    start, end = alone.layout.segments[1]
    context = alone.layout.contexts[0]
    layout = Layout(((0, end - start),), (Context(0, end - start, context.slots, 0),), alone.positions[start:end])
    got = shared_prefix_attention(
        alone.q[start:end], alone.k[start:end], alone.v[start:end], alone.kp, alone.vp, layout
    )
    assert (got - together.run()[start:end]).abs().max() < 1e-6


def test_errors_name_the_argument() -> None:
    case = shapes(torch.float32)["one candidate"]
    for change, message in (
        ({"query": case.q[:3]}, "query must be"),
        ({"key": case.k[:, :, :8]}, "do not fit query"),
        ({"value": case.v.half()}, "share one dtype"),
        ({"key_pool": case.kp[:, :, :8]}, "key_pool"),
        ({"window": 0}, "window"),
        ({"softcap": -1.0}, "softcap"),
    ):
        values = {"query": case.q, "key": case.k, "value": case.v, "key_pool": case.kp, "value_pool": case.vp}
        with pytest.raises(ValueError, match=message):
            shared_prefix_attention(**{**values, "layout": case.layout, **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without gaps"):
        Layout(((0, 2), (3, 4)), (), torch.arange(4))
    with pytest.raises(ValueError, match="positions"):
        Layout(((0, 2),), (), torch.arange(3))
    with pytest.raises(ValueError, match="outside the rows"):
        Layout(((0, 2),), (Context(0, 3, torch.arange(1), 0),), torch.arange(2))
