"""reward_pipeline: both paths against the float64 reference, which counts samples one by one."""

import math
from typing import Any

import pytest
import torch
from kernel_checks import (
    CASES,
    DTYPES,
    PATHS,
    assert_close,
    assert_compiles,
    assert_drawn,
    needs_gpu,
    on_path,
    randn,
    strided,
    wide,
)

from guiderail.kernels import reference, reward_pipeline
from guiderail.kernels.reward_pipeline import Transform, _reward_pipeline_kernel

ALL = torch.tensor([int(code) for code in Transform])
PARAMS = torch.zeros(8, 3)
PARAMS[Transform.EXP, 0] = 10.0
PARAMS[Transform.NEG_EXP, 0] = 10.0
PARAMS[Transform.LOG_SIGMOID, 0] = 0.7
PARAMS[Transform.CLIP, :2] = torch.tensor([-0.5, 1.0])
PARAMS[Transform.STANDARDIZE, :2] = torch.tensor([0.3, 2.0])


def inputs(G: int, C: int, M: int, dtype: Any = torch.float32, codes: Any = ALL) -> dict[str, Any]:
    R = len(codes)
    # tenths make ties between rewards and samples, and among each
    rewards = (randn(G, C, R) * 10).round() / 10
    samples = (randn(G, R, M, seed=1) * 10).round() / 10
    return {
        "rewards": rewards.to(dtype),
        "counts": torch.randint(1, C + 1, (G,), generator=torch.Generator().manual_seed(2)),
        "calibration": samples.to(dtype).sort(2).values,
        "codes": codes,
        "params": PARAMS[codes].contiguous(),
        "weights": randn(R, seed=3).abs() / 10,
    }


def compare(args: dict[str, Any], uniform: Any = None, beta: float = 1.0) -> Any:
    choice, combined, transformed = reward_pipeline(**args, uniform=uniform, beta=beta)
    assert (choice.dtype, combined.dtype, transformed.dtype) == (torch.int64, torch.float32, torch.float32)
    names = ("rewards", "counts", "calibration", "codes", "params", "weights")
    best, each = reference.reward_pipeline(*wide(*(args[n] for n in names)), *wide(args.get("cal_counts")))
    assert_close(transformed, each, length=64, what="transformed")  # e^x is as good as x, and x reaches 10
    assert_close(combined, best, length=64, scale=each.abs().max().item() if each.numel() else 1, what="combined")
    choice, counts = choice.cpu(), args["counts"].cpu()
    assert (choice[counts == 0] == -1).all()
    held = counts > 0
    if uniform is None:
        assert torch.equal(choice[held], combined.cpu()[held].argmax(1))
    else:
        logprobs = torch.log_softmax(combined.cpu()[held].double() / beta, 1)
        assert_drawn(choice[held], logprobs, uniform.cpu()[held])
    return choice, combined, transformed


@pytest.mark.parametrize(("path", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 17), (2, 5, 129), (1, 129, 8)], ids=str)
def test_matches_the_reference(shape: tuple[int, int, int], path: str, dtype: Any) -> None:
    with on_path(path):
        compare(inputs(*shape, dtype))
        compare(inputs(*shape, dtype), torch.rand(shape[0], generator=torch.Generator().manual_seed(4)), beta=0.3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("code", list(Transform), ids=lambda code: code.name)
def test_each_transform_alone(path: str, code: Transform) -> None:
    with on_path(path):
        compare(inputs(2, 9, 20, codes=torch.tensor([int(code)])))


@pytest.mark.parametrize("path", PATHS)
def test_quantiles_count_ties_half(path: str) -> None:
    args = inputs(1, 5, 4, codes=torch.tensor([1])) | {
        "rewards": torch.tensor([[[0.0], [1.0], [2.0], [2.5], [9.0]]]),
        "counts": torch.tensor([5]),
        "calibration": torch.tensor([[[1.0, 2.0, 2.0, 3.0]]]),
    }
    with on_path(path):
        _, _, transformed = compare(args)
    assert transformed.flatten().tolist() == [0.0, 0.125, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("path", PATHS)
def test_log_is_clamped_and_log_sigmoid_keeps_its_tails(path: str) -> None:
    args = inputs(1, 3, 4, codes=torch.tensor([4, 5])) | {"counts": torch.tensor([3])}
    args["rewards"] = torch.tensor([[[-9.0, -60.0], [9.0, 18.0], [9.0, 60.0]]])
    args["params"] = torch.zeros(2, 3)
    with on_path(path):
        _, _, transformed = compare(args)
    assert transformed[0, 0, 0].item() == pytest.approx(math.log(1 / 8))
    assert transformed[0, 0, 1].item() == pytest.approx(-60)
    assert transformed[0, 1, 1].item() == pytest.approx(-math.exp(-18), rel=1e-5)
    assert transformed[0, 2, 1].item() == pytest.approx(-math.exp(-60), rel=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_sample_counts_and_infinite_padding_say_the_same(path: str) -> None:
    args = inputs(3, 6, 20)
    used = torch.randint(1, 21, (3, 8), generator=torch.Generator().manual_seed(5))
    unused = torch.arange(20) >= used[:, :, None]
    with on_path(path):
        padded = compare(args | {"calibration": args["calibration"].masked_fill(unused, math.inf)})
        # what lies beyond the count is never read as a sample, whatever it is
        counted = compare(args | {"calibration": args["calibration"].masked_fill(unused, math.nan), "cal_counts": used})
    assert all(torch.equal(a, b) for a, b in zip(padded, counted, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_padding_is_never_looked_at(path: str) -> None:
    args = inputs(3, 7, 12) | {"counts": torch.tensor([0, 3, 7])}
    args["rewards"][0] = math.nan
    args["rewards"][1, 3:] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])[:, None]
    with on_path(path):
        choice, combined, transformed = compare(args)
        drawn, _, _ = compare(args, torch.tensor([0.5, 0.999, 0.0]))
    assert choice[0] == drawn[0] == -1
    assert (combined[0] == -math.inf).all()
    assert (combined[1, 3:] == -math.inf).all()
    assert combined[1, :3].isfinite().all()
    assert (transformed[1, 3:] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_the_first_of_equals_is_chosen(path: str) -> None:
    args = inputs(2, 5, 0, codes=torch.tensor([0])) | {"counts": torch.tensor([5, 5])}
    args["rewards"] = torch.tensor([[1.0, 3, 3, 2, 3], [0.0, 0, 0, 0, 0]])[:, :, None]
    with on_path(path):
        choice, _, _ = compare(args)
    assert choice.tolist() == [1, 0]


@pytest.mark.parametrize("path", PATHS)
def test_the_ends_of_the_uniform_number(path: str) -> None:
    args = inputs(2, 6, 0, codes=torch.tensor([0])) | {"counts": torch.tensor([6, 4])}
    args["rewards"] = torch.tensor([-1e4, 1.0, 1.0, 2.0, 1.0, -1e4]).repeat(2, 1)[:, :, None]
    args["weights"] = torch.ones(1)
    top = 1 - 2.0**-24
    with on_path(path):
        low, _, _ = compare(args, torch.zeros(2))
        high, _, _ = compare(args, torch.full((2,), top))
        cold, _, _ = compare(args, torch.tensor([0.0, top]), beta=1e-4)
    assert low.tolist() == [1, 1]
    assert high.tolist() == [4, 3]
    assert cold.tolist() == [3, 3]


@pytest.mark.parametrize("path", PATHS)
def test_draws_have_the_probabilities_asked_for(path: str) -> None:
    G = 40
    args = inputs(G, 3, 0, codes=torch.tensor([0])) | {"counts": torch.full((G,), 3), "weights": torch.ones(1)}
    args["rewards"] = torch.tensor([0.5, 0.3, 0.2]).log().repeat(G, 1)[:, :, None]
    with on_path(path):
        choice, _, _ = reward_pipeline(**args, uniform=(torch.arange(G) + 0.5) / G)
    assert torch.bincount(choice).tolist() == [20, 12, 8]


@pytest.mark.parametrize("path", PATHS)
def test_any_strides(path: str) -> None:
    args = {name: strided(value) for name, value in inputs(2, 9, 20).items()}
    args["rewards"] = args["rewards"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    with on_path(path):
        compare(args, strided(torch.tensor([0.2, 0.8])))


@pytest.mark.parametrize("path", PATHS)
def test_no_groups(path: str) -> None:
    args = inputs(1, 4, 5)
    args |= {name: args[name][:0] for name in ("rewards", "counts", "calibration")}
    with on_path(path):
        shapes = [list(t.shape) for t in reward_pipeline(**args)]
    assert shapes == [[0], [0, 4], [0, 4, 8]]


def changed(name: str, index: Any, value: float) -> dict[str, Any]:
    tensor = inputs(2, 4, 5)[name].clone()
    tensor[index] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(2, 4)}, "rewards must have shape"),
        ({"rewards": torch.zeros(2, 4, 8, dtype=torch.float64)}, "rewards must be float16"),
        (changed("rewards", (0, 0, 0), math.nan), "rewards must be finite"),
        (changed("rewards", (1, 0, 7), math.inf), "rewards must be finite"),
        ({"counts": torch.tensor([1, 5])}, "counts must lie"),
        ({"counts": torch.tensor([-1, 4])}, "counts must lie"),
        ({"counts": torch.tensor([1.0, 4.0])}, "counts must be int64"),
        ({"calibration": torch.zeros(2, 7, 5)}, "calibration must have shape"),
        ({"calibration": torch.zeros(2, 8, 0)}, "calibration must hold a sample"),
        ({"calibration": torch.full((2, 8, 5), math.inf)}, "calibration must hold a sample"),
        (changed("calibration", (0, 1, 2), math.nan), "calibration must be finite"),
        (changed("calibration", (0, 2, 0), -math.inf), "calibration must be finite"),
        (changed("calibration", (1, 3, 0), 100.0), "calibration must be finite and ascending"),
        (changed("calibration", (1, 4, 4), math.inf) | {"cal_counts": torch.full((2, 8), 5)}, "calibration must be f"),
        ({"cal_counts": torch.full((2, 8), 6)}, "cal_counts must lie"),
        ({"cal_counts": torch.zeros(2, 8, dtype=torch.int64)}, "calibration must hold a sample"),
        ({"cal_counts": torch.zeros(2, 8)}, "cal_counts must be int64"),
        (changed("codes", 0, 8), "codes must lie"),
        (changed("codes", 0, -1), "codes must lie"),
        (changed("params", (0, 2), math.nan), "params must be finite"),
        (changed("params", (2, 0), 81.0), "params: |p0|"),
        (changed("params", (3, 0), -81.0), "params: |p0|"),
        (changed("params", (6, 0), 2.0), "params: p0 must not exceed"),
        (changed("params", (7, 1), 0.0), "params: p1 must be positive"),
        ({"params": torch.zeros(8, 2)}, "params must have shape"),
        (changed("weights", 0, math.inf), "weights must be finite"),
        ({"weights": torch.zeros(8).half()}, "weights must be float32"),
        ({"uniform": torch.tensor([0.0, 1.0])}, "uniform must lie"),
        ({"uniform": torch.tensor([0.0, math.nan])}, "uniform must lie"),
        ({"uniform": torch.zeros(3)}, "uniform must have shape"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": math.inf}, "beta must be positive"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else ",".join(value),
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        reward_pipeline(**(inputs(2, 4, 5) | change))


def test_samples_are_checked_only_where_a_code_needs_them() -> None:
    args = inputs(2, 4, 5, codes=torch.tensor([0, 6]))
    reward_pipeline(**(args | {"calibration": torch.full((2, 2, 5), math.nan)}))


@pytest.mark.parametrize("draw", [False, True])
def test_compiles_for_a_gpu(draw: bool) -> None:
    integers = ("counts_ptr", "sample_counts_ptr", "codes_ptr", "choice_ptr")
    types = {"rewards_ptr": "*bf16", "samples_ptr": "*bf16", "beta": "fp32"} | dict.fromkeys(integers, "*i64")
    flags = {"HAS_SAMPLE_COUNTS": draw, "DRAW": draw}
    assert_compiles(_reward_pipeline_kernel, types, flags | {"BLOCK_C": 64})
    ones = dict.fromkeys(("reward_g_stride", "reward_c_stride", "reward_r_stride", "C", "R", "M"), 1)
    assert_compiles(_reward_pipeline_kernel, types, flags | ones | {"BLOCK_C": 1})


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 17, 129), (3, 129, 100)], ids=str)
def test_compiled_kernel(shape: tuple[int, int, int], dtype: Any) -> None:
    args = {name: value.cuda() for name, value in inputs(*shape, dtype).items()}
    compare(args)
    compare(args, torch.linspace(0, 0.99, shape[0]).cuda(), beta=0.3)
    compare(args | {"cal_counts": torch.full((shape[0], 8), shape[2]).cuda()})
