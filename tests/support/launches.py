"""Records what Triton would launch and compile on a card, without a card: nothing runs, so results mean nothing.

The keys are Triton's own: the types, divisibility and constants that it compiles a variant for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from guiderail.kernels import _dispatch


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Inside, operations take the Triton path; yields the (kernel, variant) of every launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    launches: list[tuple[str, str]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, options = bind(*args, **options)
        launches.append((self.fn.__name__, str((specialization, sorted(options.items())))))

    with monkeypatch.context() as patch, _dispatch.force("triton"):
        patch.setattr(JITFunction, "run", run)
        yield launches


def warmed_up(runner: Any, launches: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """Launches of the warm-up of a reward model's runner, as on a GPU; the runner is left on the CPU."""
    runner._device = torch.device("cuda")  # as if: everything stays on the CPU, where nothing is launched
    runner.warm_up()
    runner._device = torch.device("cpu")
    return set(launches)
