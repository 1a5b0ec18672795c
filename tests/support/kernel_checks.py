"""Common ground of the kernel tests: both paths on one machine, tolerances, and comparisons that say what is wrong.

The Triton path runs on CPU tensors under Triton's interpreter. `TRITON_INTERPRET=1` is of no use for that
here: it is read when a function is decorated, Triton decorates its own library (tl.sum, tl.cumsum, ...) when
it is first imported, vLLM may import it before us, and a value left in the environment would reach the
engine processes. So `interpreted` exchanges compiled functions for interpreted ones, in Triton's library and
in our kernels, for the length of a `with`, and touches neither the environment nor the order of imports.
"""

import functools
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import guiderail.kernels
from guiderail.kernels import _dispatch

# (float type of the inputs, path): the interpreter computes nonsense from bfloat16, so Triton's bf16 is for GPUs.
CASES = [
    pytest.param("torch", torch.float32, id="torch-fp32"),
    pytest.param("torch", torch.float16, id="torch-fp16"),
    pytest.param("torch", torch.bfloat16, id="torch-bf16"),
    pytest.param("triton", torch.float32, id="triton-fp32"),
    pytest.param("triton", torch.float16, id="triton-fp16"),
]
PATHS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

_EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def needs_gpu(test: Any) -> Any:
    """Marks a test as one of the compiled kernel: `gpu`, and skipped where there is no CUDA device."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(skip(test))


@functools.cache
def _interpreted_twin(function: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    twin = InterpretedFunction(function.fn)
    twin.rewrite()  # now: it reads the function's source through a JITFunction, which rejects exchanged callees
    return twin


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, Triton kernels of guiderail.kernels launch in Triton's interpreter, on CPU tensors."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    for each in pkgutil.iter_modules(guiderail.kernels.__path__):  # some are imported when they are first called
        importlib.import_module(f"{guiderail.kernels.__name__}.{each.name}")
    # Triton imports it late, and it rejects exchanged functions.
    importlib.import_module("triton.experimental.gluon.language")
    kernels = [module for name, module in sys.modules.items() if name.startswith(guiderail.kernels.__name__ + ".")]
    twins = [
        (module, name, _interpreted_twin(value))
        for module in [tl, tl.standard, *kernels]
        for name, value in list(vars(module).items())
        if isinstance(value, JITFunction)
    ]
    # The interpreter leaves its own changes to tl.core and the classes there behind after calls between functions,
    # and nothing would compile in this process any more. So all of it is put back by us.
    types = [value for value in vars(tl.core).values() if isinstance(value, type) and "triton" in value.__module__]
    before = [(owner, dict(vars(owner))) for owner in [tl, tl.core, tl.math, tl.standard, *kernels, *types]]
    for module, name, twin in twins:
        setattr(module, name, twin)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about NaN, which tests put there on purpose
            yield
    finally:
        for owner, attributes in before:
            for name in [name for name in vars(owner) if name not in attributes]:
                delattr(owner, name)
            for name, value in attributes.items():
                if vars(owner)[name] is not value:
                    setattr(owner, name, value)


@contextmanager
def on_path(path: str) -> Iterator[None]:
    """Inside, operations on CPU tensors take the "torch" path, or the "triton" path in the interpreter."""
    if path == "torch":
        with _dispatch.force("torch"):
            yield
    else:
        pytest.importorskip("triton")
        with interpreted(), _dispatch.force("triton"):
            yield


def assert_compiles(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> None:
    """Compiles a kernel to machine code for an H100, which needs no GPU; Triton raises where it cannot.

    `types` as in Triton's signatures; pointers not named are of float32, other arguments int32.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    fixed = {(names.index(name),): value for name, value in constants.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces a default of its next release
        made = triton.compile(ASTSource(kernel, signature, fixed), GPUTarget("cuda", 90, 32), options)
    assert made.asm["cubin"]


def randn(*shape: int, dtype: Any = torch.float32, seed: int = 0, scale: float = 1.0) -> Any:
    """Normal numbers that depend on the seed and the shape alone, rounded to the dtype."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def strided(tensor: Any) -> Any:
    """The same values with gaps between all rows and columns: no dimension has stride 1."""
    wide = torch.zeros([*tensor.shape[:-1], 2 * tensor.shape[-1] + 1], dtype=tensor.dtype, device=tensor.device)
    view = wide[..., 1::2]
    view.copy_(tensor)
    return view


def wide(*tensors: Any) -> tuple[Any, ...]:
    """Floating tensors in float64 on the CPU, for the reference; others (and None) as they are, on the CPU."""
    return tuple(
        t if not isinstance(t, torch.Tensor) else t.cpu().double() if t.is_floating_point() else t.cpu()
        for t in tensors
    )


def tolerance(dtype: Any, length: int, scale: float = 1.0) -> tuple[float, float]:
    """(rtol, atol) for a result held in `dtype` after summing `length` products in float32 or wider.

    Rounding errors of a sum grow like the root of its length; `scale` is the size of the sum's terms.
    """
    accumulated = _EPS[torch.float32] * 4 * max(length, 1) ** 0.5
    return max(_EPS[dtype], accumulated), max(_EPS[dtype], accumulated) * scale


def assert_close(
    actual: Any, expected: Any, *, dtype: Any = torch.float32, length: int = 1, scale: float = 1.0, what: str = "result"
) -> None:
    """Fails unless shapes, NaN places, infinities and (within `tolerance`) all finite values agree."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    for name, found in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = (found(actual) != found(expected)).nonzero()
        assert not len(differs), f"{what}: {name} misplaced at {differs[:5].tolist()} ({len(differs)} places)"
    rtol, atol = tolerance(dtype, length, scale)
    finite = torch.isfinite(expected)
    error = torch.where(finite, (actual - expected).abs() - (atol + rtol * expected.abs()), -torch.inf)
    if error.numel() and error.max() > 0:
        worst = error.flatten().topk(min(5, error.numel())).indices
        at = [tuple(int(i) for i in torch.unravel_index(w, error.shape)) for w in worst]
        lines = [f"  {list(i)}: {actual[i].item():.9g}, expected {expected[i].item():.9g}" for i in at]
        over = int((error > 0).sum())
        pytest.fail(f"{what}: {over} of {error.numel()} beyond rtol {rtol:.1e}, atol {atol:.1e}\n" + "\n".join(lines))


def assert_drawn(choice: Any, logprobs: Any, uniform: Any, *, slack: float = 1e-5) -> None:
    """Fails unless each choice [N] is where the CDF of logprobs [N, V] passes uniform [N], within `slack`."""
    probabilities = logprobs.double().exp()
    cdf = probabilities.cumsum(1)
    for row, (pick, u) in enumerate(zip(choice.tolist(), uniform.double().tolist(), strict=True)):
        assert 0 <= pick < probabilities.shape[1], f"row {row}: choice {pick}"
        assert probabilities[row, pick] > 0, f"row {row}: {pick} has probability 0"
        below = cdf[row, pick - 1].item() if pick else 0.0
        assert below - slack <= u < cdf[row, pick].item() + slack, f"row {row}: {pick} for {u}"
