"""tilt_sample: both paths against the float64 reference, for what is drawn and for its log-probability."""

import math
from typing import Any

import kernel_reference
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

from guiderail.kernels import tilt_sample
from guiderail.kernels.tilt_sample import _block_mass_kernel, _draw_kernel

NAMES = ("logits", "other_logprobs", "alpha", "temperature", "uniform")


def inputs(B: int, V: int, dtype: Any = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "logits": randn(B, V, dtype=dtype, scale=3),
        "other_logprobs": torch.log_softmax(randn(B, V, seed=4), 1).to(dtype),
        "alpha": randn(B, seed=5),
        "temperature": torch.rand(B, generator=generator) * 2 + 0.1,
        "uniform": torch.rand(B, generator=generator),
    }


def compare(args: dict[str, Any]) -> tuple[Any, Any]:
    token, logprob = tilt_sample(**args)
    assert (token.dtype, logprob.dtype) == (torch.int64, torch.float32)
    *tilts, temperature, uniform = wide(*(args[name] for name in NAMES))
    z = kernel_reference.tilted_logits(*tilts)
    logprobs = kernel_reference.tilted_logprobs(z, temperature)
    token = token.cpu()
    expected = logprobs.gather(1, token[:, None])[:, 0]
    assert_close(logprob, expected, length=z.shape[1], scale=expected.abs().max().item(), what="logprob")
    warm = temperature > 0
    assert_drawn(token[warm], logprobs[warm], uniform[warm])
    near = z.max(1).values * torch.ones(1).double()
    assert_close(z.gather(1, token[:, None])[:, 0][~warm], near[~warm], scale=10, what="greedy")
    return token, logprob.cpu()


@pytest.mark.parametrize(("path", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 129), (5, 5000)], ids=str)
def test_matches_the_reference(shape: tuple[int, int], path: str, dtype: Any) -> None:
    args = inputs(*shape, dtype)
    args["temperature"][0] = 0.0
    with on_path(path):
        compare(args)
        compare(args | {"other_logprobs": None})
        compare(args | {"temperature": torch.full_like(args["temperature"], 0.7)})


@pytest.mark.parametrize(("path", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(3, 129), (2, 5000)], ids=str)
def test_tokens_masked_before_a_negative_mix_are_never_drawn(shape: tuple[int, int], path: str, dtype: Any) -> None:
    """Contrastive decoding's mask, as logit_mix sets it: whole blocks may have nothing left."""
    args = inputs(*shape, dtype)
    args["alpha"] = -args["alpha"].abs() - 0.5
    args["temperature"][0] = 0.0
    kept = args["logits"] >= args["logits"].amax(1, keepdim=True) + math.log(0.1)
    args["logits"] = args["logits"].masked_fill(~kept, -math.inf)
    with on_path(path):
        for uniform in (0.0, 0.999):
            token, _ = compare(args | {"uniform": torch.full_like(args["uniform"], uniform)})
            assert kept.cpu().gather(1, token[:, None]).all()


@pytest.mark.parametrize("path", PATHS)
def test_many_blocks_are_one_distribution(path: str) -> None:
    """Equal logits over blocks of 4096: the token is floor(V * uniform), wherever it lies."""
    V, B = 9001, 40
    uniform = (torch.arange(B) + 0.5) / B
    args = inputs(B, V) | {"logits": torch.zeros(B, V), "other_logprobs": None, "uniform": uniform}
    with on_path(path):
        token, logprob = compare(args)
    assert ((token - (V * uniform).floor()).abs() <= 1).all()
    assert_close(logprob, torch.full((B,), -math.log(V)))


@pytest.mark.parametrize("path", PATHS)
def test_draws_have_the_probabilities_asked_for(path: str) -> None:
    B = 20
    args = inputs(B, 4) | {"temperature": torch.ones(B), "other_logprobs": None}
    args |= {"logits": torch.tensor([0.5, 0.0, 0.3, 0.2]).log().repeat(B, 1), "uniform": (torch.arange(B) + 0.5) / B}
    with on_path(path):
        token, _ = compare(args)
    assert torch.bincount(token).tolist() == [10, 0, 6, 4]


@pytest.mark.parametrize("path", PATHS)
def test_temperature_zero_takes_the_first_of_equals(path: str) -> None:
    logits = torch.zeros(3, 9000)
    logits[0, [4000, 4097, 8999]] = 5.0  # the first two lie in different blocks
    logits[1, [8500, 8501]] = 5.0
    args = inputs(3, 9000) | {"logits": logits, "other_logprobs": None, "temperature": torch.zeros(3)}
    with on_path(path):
        token, logprob = tilt_sample(**args)
    assert token.tolist() == [4000, 8500, 0]
    expected = torch.log_softmax(logits.double(), 1).gather(1, token[:, None])[:, 0]  # of temperature 1
    assert_close(logprob, expected, length=9000)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-24])
def test_minus_infinity_is_never_drawn(path: str, u: float) -> None:
    args = inputs(3, 9000) | {"other_logprobs": None, "uniform": torch.full((3,), u)}
    args["logits"] = torch.full((3, 9000), -math.inf)
    args["logits"][0, [3, 4500]] = 0.0
    args["logits"][1, 4096] = 0.0  # whole blocks of -inf before and after
    args["logits"][2, 100:8000] = randn(7900)
    args["temperature"][2] = 0.0
    with on_path(path):
        token, logprob = compare(args)
    assert token[1] == 4096
    assert logprob[1].item() == pytest.approx(0.0, abs=1e-6)
    assert token[0] == (3 if u < 0.5 else 4500)


@pytest.mark.parametrize("path", PATHS)
def test_alpha_zero_silences_the_other_model(path: str) -> None:
    args = inputs(2, 50) | {"alpha": torch.tensor([0.0, 1.0])}
    args["other_logprobs"][:, :49] = -math.inf
    with on_path(path):
        token, logprob = compare(args)
    assert token[1] == 49
    assert logprob[1].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_any_strides(path: str) -> None:
    args = {name: strided(value) for name, value in inputs(3, 129).items()}
    args["logits"] = args["logits"].T.contiguous().T
    with on_path(path):
        compare(args)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 4096])
def test_bad_rows_raise_and_are_marked_without_validation(path: str, bad: float, where: int) -> None:
    args = inputs(4, 4500)
    args["logits"][1, where] = bad
    args["logits"][2] = -math.inf
    args["temperature"][3] = 0.0
    with on_path(path):
        with pytest.raises(ValueError, match="logits: a row's tilted logits hold"):
            tilt_sample(**args)
        token, logprob = tilt_sample(**args, validate=False)
        good = [0, 3]
        alone = tilt_sample(**{name: value[good] for name, value in args.items()})
    assert token[[1, 2]].tolist() == [-1, -1]
    assert logprob[[1, 2]].isnan().all()
    assert torch.equal(token[good], alone[0])
    assert_close(logprob[good], alone[1])


@pytest.mark.parametrize("path", PATHS)
def test_the_other_model_can_make_a_row_bad(path: str) -> None:
    args = inputs(1, 20) | {"alpha": torch.tensor([-1.0])}
    args["other_logprobs"][0, 3] = -math.inf  # times -1
    with on_path(path), pytest.raises(ValueError, match="logits: a row's tilted logits hold"):
        tilt_sample(**args)


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path: str) -> None:
    with on_path(path):
        assert [list(t.shape) for t in tilt_sample(**inputs(0, 7))] == [[0], [0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5)}, "logits must have shape"),
        ({"logits": torch.zeros(2, 5, dtype=torch.float64)}, "logits must be float16"),
        ({"logits": torch.zeros(2, 0), "other_logprobs": None}, "logits must have at least"),
        ({"other_logprobs": torch.zeros(2, 4)}, "other_logprobs must have shape"),
        ({"alpha": torch.zeros(2).half()}, "alpha must be float32"),
        ({"alpha": torch.tensor([0.0, math.nan])}, "alpha must be finite"),
        ({"temperature": torch.tensor([0.0, -1.0])}, "temperature must be finite and at least 0"),
        ({"temperature": torch.tensor([0.0, math.nan])}, "temperature must be finite and at least 0"),
        ({"uniform": torch.tensor([0.0, 1.0])}, "uniform must lie"),
        ({"uniform": torch.tensor([-0.1, 0.0])}, "uniform must lie"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else ",".join(value),
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tilt_sample(**(inputs(2, 5) | change))


@pytest.mark.parametrize("other", [False, True])
def test_compiles_for_a_gpu(other: bool) -> None:
    types = {"logits_ptr": "*bf16", "other_ptr": "*bf16", "token_ptr": "*i64"}
    full = {"HAS_OTHER": other, "BLOCK_V": 4096}
    assert_compiles(_block_mass_kernel, types, full, num_warps=8)
    assert_compiles(_draw_kernel, types, full | {"BLOCK_N": 64}, num_warps=8)
    strides = ("logits_row_stride", "logits_col_stride", "other_row_stride", "other_col_stride")
    ones = dict.fromkeys((*strides, "V", "BLOCK_V"), 1) | {"HAS_OTHER": other}
    assert_compiles(_block_mass_kernel, types, ones)
    assert_compiles(_draw_kernel, types, ones | {"blocks": 1, "BLOCK_N": 1})


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (4, 256000)], ids=str)
def test_compiled_kernel(shape: tuple[int, int], dtype: Any) -> None:
    args = {name: value.cuda() for name, value in inputs(*shape, dtype).items()}
    args["temperature"][0] = 0.0
    compare(args)
    compare(args | {"other_logprobs": None})
