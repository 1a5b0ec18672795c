"""OpenAI's `system_fingerprint`: what an answer depends on beside its request, in a form that a person can read."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def system_fingerprint(model: str, dtype: str, *, batch_invariant: bool) -> str:
    """Model, dtype, versions and mode, as in `smollm2 float32 guiderail-1.0 vllm-0.32.0 torch-2.13.0 fast`.

    The mode is `batch-invariant`, or `fast`: rounding then depends on what else runs, and a seed promises less.
    """
    parts = [model, dtype, *(f"{name}-{_version(name)}" for name in ("guiderail", "vllm", "torch"))]
    return " ".join([*filter(None, parts), "batch-invariant" if batch_invariant else "fast"])


def _version(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):  # vLLM's CPU build is a distribution of its own
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"
