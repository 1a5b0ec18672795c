"""Choice between an operation's Triton and torch path, and what all operations share: checks, launches, sizes.

Rule: a CUDA tensor takes the Triton path where Triton imports; everything else takes the torch path.
`force` overrides the rule for tests (the Triton path runs on CPU tensors under Triton's interpreter).

Kernel files take `tl`, `triton` and `jit` from here, so that they import on machines without Triton; the
stand-ins are never called there, because `use_triton` is then False.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal, overload

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = SimpleNamespace(constexpr=object)

__all__ = [
    "FLOATS", "LARGE_SHARED_MEMORY", "check", "fail_if", "force", "jit", "launch", "next_power_of_2",
    "shared_memory_of", "tl", "triton", "use_triton",
]  # fmt: skip

LARGE_SHARED_MEMORY = 200 << 10  # bytes a program can have: H100 and B200 have 227 KiB, A100 163, others 99
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
AVAILABLE = triton is not None

_forced: Literal["triton", "torch"] | None = None


@overload
def jit(fn: Callable[..., Any]) -> Any: ...


@overload
def jit(*, varying: Sequence[str] = (), unaligned: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]: ...


def jit(fn: Callable[..., Any] | None = None, *, varying: Sequence[str] = (), unaligned: Sequence[str] = ()) -> Any:
    """Apply `triton.jit`, or return the plain function where there is no Triton.

    Triton compiles a kernel anew for each kind of argument: an integer that is 1 or a multiple of 16, a pointer that
    is aligned to 16 bytes. varying: integers that change between calls, for which it must not. unaligned: pointers
    that are read one value at a time, whose alignment is of no use.
    """

    def decorate(fn: Callable[..., Any]) -> Any:
        if not AVAILABLE:
            return fn
        return triton.jit(fn, do_not_specialize=list(varying), do_not_specialize_on_alignment=list(unaligned))

    return decorate if fn is None else decorate(fn)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first tensor, which need not be the current one (Triton takes that)."""
    first = next(each for each in args if isinstance(each, torch.Tensor))
    with _current(first):
        kernel[grid](*args, **options)


def _current(tensor: Any) -> AbstractContextManager[Any]:
    """Make a CUDA tensor's device the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def shared_memory_of(tensor: Any) -> int:
    """Return the bytes of shared memory that one program can have on the tensor's device; 0 on the CPU."""
    if not tensor.is_cuda:
        return 0
    return int(torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin)


def use_triton(tensor: Any) -> bool:
    """Return True where this tensor's operation must run its Triton kernel."""
    if _forced is not None:
        return _forced == "triton"
    return AVAILABLE and bool(tensor.is_cuda)


@contextmanager
def force(path: Literal["triton", "torch"]) -> Iterator[None]:
    """Make every operation take the named path, whatever the device; for tests and benchmarks.

    Raises ValueError for another name and RuntimeError for "triton" where Triton does not import.
    """
    global _forced
    if path not in ("triton", "torch"):
        raise ValueError(f"path must be 'triton' or 'torch', not {path!r}")
    if path == "triton" and not AVAILABLE:
        raise RuntimeError("Triton does not import on this machine")
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least n (1 for n <= 1): Triton block sizes are powers of two."""
    return 1 << max(n - 1, 0).bit_length()


def check(name: str, tensor: Any, shape: Sequence[int | None], dtypes: Sequence[Any], device: Any = None) -> None:
    """Raise ValueError naming the argument unless its shape (None: any size), dtype and device are as asked."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(w is not None and w != g for w, g in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("?" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted}, not {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not on {tensor.device}")


def fail_if(problems: Sequence[tuple[Any, str]]) -> None:
    """Raise ValueError with the message of the first problem whose 0-dim bool tensor is true.

    The flags are read together, so that a wrapper waits for the device once.
    """
    flags = torch.stack([flag for flag, _ in problems]).tolist()
    for flag, (_, message) in zip(flags, problems, strict=True):
        if flag:
            raise ValueError(message)
