"""vLLM's native operations for CPU tensors, for reward models that run in our own process.

RMSNorm took a quarter and rotary embedding a ninth of torch's time (2 cores, AMX, 1,424 tokens of SmolLM2-135M).
"""

from functools import cache
from typing import Any

from guiderail.server.engines.vllm.environment import prepare_environment

MULTIPLE = 32  # rows whose width is no multiple of this are left to torch: the operations work in whole vectors


@cache
def native_ops() -> Any | None:
    """Return a module with rms_norm and rotary_embedding for CPU tensors, None if this vLLM has none."""
    prepare_environment()
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    current_platform.import_kernels()
    import torch
    from vllm import _custom_ops

    there = all(hasattr(torch.ops._C, name) for name in ("rms_norm", "rotary_embedding"))
    return _custom_ops if there else None
