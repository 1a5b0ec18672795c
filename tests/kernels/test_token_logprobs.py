"""token_logprobs: both paths against the float64 kernel_reference."""

import math
from typing import Any

import kernel_reference
import pytest
import torch
from kernel_checks import CASES, DTYPES, PATHS, assert_close, assert_compiles, needs_gpu, on_path, randn, strided, wide

from guiderail.kernels import token_logprobs

# The module: the package's attribute of the same name is the function.
from guiderail.kernels.token_logprobs import _token_logprobs_kernel, _torch_path


def inputs(T: int, V: int, H: int, dtype: Any = torch.float32) -> tuple[Any, Any, Any]:
    tokens = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))
    return randn(T, H, dtype=dtype), randn(V, H, dtype=dtype, seed=2), tokens


def compare(args: tuple[Any, Any, Any], softcap: float | None = None) -> None:
    out = token_logprobs(*args, softcap=softcap)
    assert out.dtype == torch.float32
    H = args[0].shape[1]
    # a logit is a sum of H products; the cap by exp loses up to cap * eps where the kernel has no tanh
    assert_close(out, kernel_reference.token_logprobs(*wide(*args), softcap), length=H, scale=1 + (softcap or 0) / 10)


@pytest.mark.parametrize(("path", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 16), (17, 129, 40), (129, 257, 33)], ids=str)
def test_matches_the_reference(shape: tuple[int, int, int], path: str, dtype: Any) -> None:
    with on_path(path):
        compare(inputs(*shape, dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(path: str, softcap: float) -> None:
    with on_path(path):
        compare(inputs(17, 200, 24), softcap)


@pytest.mark.parametrize("path", PATHS)
def test_any_strides(path: str) -> None:
    hidden, weight, tokens = inputs(17, 129, 24)
    with on_path(path):
        compare((strided(hidden), weight.T.contiguous().T, strided(tokens)))


@pytest.mark.parametrize("path", PATHS)
def test_splits_of_the_vocabulary_are_joined(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _torch_path.__globals__
    monkeypatch.setitem(settings, "PROGRAMS", 3)  # five blocks in splits of two, two and one
    monkeypatch.setitem(settings, "CHUNK_ELEMENTS", 17 * 50)  # and twelve chunks of 50 and one rest
    with on_path(path):
        compare(inputs(17, 613, 16))


@pytest.mark.parametrize("path", PATHS)
def test_large_logits_do_not_overflow(path: str) -> None:
    hidden, weight, tokens = inputs(5, 140, 32)
    tokens[0] = (hidden[0] @ weight.T).argmax()
    args = (hidden * 1000, weight, tokens)
    with on_path(path):
        out = token_logprobs(*args)
    assert_close(out, kernel_reference.token_logprobs(*wide(*args)), length=32, scale=3000)
    assert abs(out[0]) < 1e-6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_itself_alone(path: str, bad: float) -> None:
    hidden, weight, tokens = inputs(6, 140, 16)
    hidden[2, 3] = bad
    with on_path(path):
        out = token_logprobs(hidden, weight, tokens)
    good = [0, 1, 3, 4, 5]
    assert out[2].isnan()
    assert_close(out[good], kernel_reference.token_logprobs(*wide(hidden[good], weight, tokens[good])), length=16)


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path: str) -> None:
    with on_path(path):
        assert token_logprobs(*inputs(0, 5, 4)).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, "hidden must have shape"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden must be float16"),
        ({"weight": torch.zeros(5, 3)}, "weight must have shape"),
        ({"weight": torch.zeros(5, 4).half()}, "weight must be float32"),
        ({"weight": torch.zeros(0, 4)}, "weight must have at least"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, "tokens must have shape"),
        ({"tokens": torch.zeros(3)}, "tokens must be int64"),
        ({"tokens": torch.tensor([0, 5, 1])}, "tokens must lie"),
        ({"tokens": torch.tensor([0, -1, 1])}, "tokens must lie"),
        ({"softcap": 0.0}, "softcap must be"),
        ({"softcap": math.inf}, "softcap must be"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    args = dict(zip(("hidden", "weight", "tokens"), inputs(3, 5, 4), strict=True))
    with pytest.raises(ValueError, match=message):
        token_logprobs(**(args | change))


@pytest.mark.parametrize(("dtype", "blocks"), [("bf16", (128, 128, 64)), ("fp32", (64, 128, 32))])
def test_compiles_for_a_gpu(dtype: str, blocks: tuple[int, int, int]) -> None:
    types = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "tokens_ptr": "*i64", "softcap": "fp32"}
    constants = dict(zip(("BLOCK_T", "BLOCK_V", "BLOCK_H"), blocks, strict=True))
    assert_compiles(_token_logprobs_kernel, types, constants | {"HAS_CAP": True}, num_warps=8, num_stages=3)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 1000, 129), (300, 32003, 576)], ids=str)
def test_compiled_kernel(shape: tuple[int, int, int], dtype: Any) -> None:
    hidden, weight, tokens = inputs(*shape, dtype)
    args = (hidden.cuda(), (weight * shape[2] ** -0.5).cuda(), tokens.cuda())
    compare(args)
    compare(args, 30.0)
