"""reward_head: both paths against the float64 kernel_reference."""

import math
import subprocess
import sys
from typing import Any

import kernel_reference
import pytest
import torch
from kernel_checks import CASES, DTYPES, PATHS, assert_close, assert_compiles, needs_gpu, on_path, randn, strided, wide

from guiderail.kernels import reward_head
from guiderail.kernels.reward_head import _reward_head_kernel

EPS = 1e-5


def inputs(T: int, H: int, S: int, K: int, dtype: Any = torch.float32) -> dict[str, Any]:
    return {
        "hidden": randn(T, H, dtype=dtype, scale=3),
        "last": torch.randint(T, (S,), generator=torch.Generator().manual_seed(1)),
        "norm_weight": randn(H, dtype=dtype, seed=2) + 1,
        "eps": EPS,
        "head_weight": randn(K, H, dtype=dtype, seed=3),
        "head_bias": randn(K, dtype=dtype, seed=4),
    }


def expected(args: dict[str, Any], **more: Any) -> Any:
    return kernel_reference.reward_head(*wide(*args.values()), **more)


def compare(args: dict[str, Any], **more: Any) -> None:
    out = reward_head(**args, **more)
    assert out.dtype == torch.float32
    assert_close(out, expected(args, **more), length=args["hidden"].shape[1], scale=4)


@pytest.mark.parametrize(("path", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (17, 129, 5, 3), (40, 600, 3, 17), (9, 64, 9, 1)], ids=str)
def test_matches_the_reference(shape: tuple[int, ...], path: str, dtype: Any) -> None:
    with on_path(path):
        compare(inputs(*shape, dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gemma", [False, True])
def test_gemma_weights_are_offsets_from_one(path: str, gemma: bool) -> None:
    with on_path(path):
        compare(inputs(17, 129, 4, 2), gemma_style=gemma)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("missing", [["norm_weight"], ["head_bias"], ["norm_weight", "head_bias"]], ids=str)
def test_norm_and_bias_can_be_left_out(path: str, missing: list[str]) -> None:
    with on_path(path):
        compare(inputs(17, 129, 4, 2) | dict.fromkeys(missing))


@pytest.mark.parametrize("path", PATHS)
def test_any_strides_and_mixed_weight_types(path: str) -> None:
    args = inputs(17, 129, 4, 3)
    args |= {name: strided(args[name]) for name in args if name not in ("eps", "last")}
    args |= {"hidden": args["hidden"].half(), "head_weight": randn(129, 3, seed=5).T}
    args["last"] = strided(args["last"])
    args["hidden"] = strided(args["hidden"])
    with on_path(path):
        compare(args)


@pytest.mark.parametrize("path", PATHS)
def test_rows_repeat_and_keep_their_order(path: str) -> None:
    args = inputs(8, 33, 1, 2) | {"last": torch.tensor([7, 0, 7, 3])}
    with on_path(path):
        out = reward_head(**args)
    assert_close(out[0], out[2], length=33)
    assert_close(out, expected(args), length=33, scale=4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_itself_alone(path: str, bad: float) -> None:
    args = inputs(6, 40, 1, 2) | {"last": torch.tensor([0, 2, 4])}
    args["hidden"][2, 5] = bad
    args["hidden"][3] = bad  # not asked for
    with on_path(path):
        out = reward_head(**args)
    assert out[1].isnan().all()
    assert_close(out[[0, 2]], expected(args | {"last": torch.tensor([0, 4])}), length=40, scale=4)


@pytest.mark.parametrize("path", PATHS)
def test_no_sequences_give_no_rows(path: str) -> None:
    with on_path(path):
        assert reward_head(**inputs(4, 8, 0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, "hidden must have shape"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.float64)}, "hidden must be float16"),
        ({"hidden": [[1.0]]}, "hidden must be a tensor"),
        ({"last": torch.tensor([0], dtype=torch.int32)}, "last must be int64"),
        ({"last": torch.tensor([4])}, "last must hold rows"),
        ({"last": torch.tensor([-1])}, "last must hold rows"),
        ({"last": torch.zeros(1, dtype=torch.int64, device="meta")}, "last must be on cpu"),
        ({"norm_weight": torch.zeros(7)}, "norm_weight must have shape"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": math.nan}, "eps must be positive"),
        ({"head_weight": torch.zeros(2, 7)}, "head_weight must have shape"),
        ({"head_weight": torch.zeros(0, 8), "head_bias": None}, "head_weight must have at least"),
        ({"head_bias": torch.zeros(3)}, "head_bias must have shape"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_head(**(inputs(4, 8, 2, 2) | change))


def test_kernels_need_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, guiderail.kernels as k\n"
        "from guiderail.kernels._dispatch import force\n"
        "print(k.reward_head(torch.ones(2, 3), torch.tensor([1]), None, 1, torch.ones(1, 3)).item())\n"
        "try: force('triton').__enter__()\n"
        "except RuntimeError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["3.0", "Triton does not import on this machine"]


def test_compiles_for_a_gpu() -> None:
    types = {"hidden_ptr": "*bf16", "last_ptr": "*i64", "weight_ptr": "*bf16", "eps": "fp32"}
    flags = {"HAS_NORM": True, "GEMMA": True, "HAS_BIAS": True}
    assert_compiles(_reward_head_kernel, types, flags | {"BLOCK_K": 16, "BLOCK_H": 256})
    ones = dict.fromkeys(
        ("hidden_row_stride", "hidden_col_stride", "weight_row_stride", "weight_col_stride", "H", "K"), 1
    )
    assert_compiles(_reward_head_kernel, types, flags | ones | {"BLOCK_K": 1, "BLOCK_H": 1})


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (300, 2048, 37, 1), (129, 4096, 17, 19)], ids=str)
def test_compiled_kernel(shape: tuple[int, ...], dtype: Any) -> None:
    args = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in inputs(*shape, dtype).items()}
    compare(args)
    compare(args | {"norm_weight": None, "head_bias": None})
    compare(args, gemma_style=True)
