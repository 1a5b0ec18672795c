"""Device, dtype and memory of a reward model that runs here, and how long a text it reads with that memory."""

from collections.abc import Callable
from typing import Any

from guiderail.server.engines.vllm.engine_args import EngineSettings
from guiderail.server.engines.vllm.environment import on_cpu
from guiderail.server.memory.kv_pool import GIB, default_pool, host_pool
from guiderail.server.memory.model_size import read_shape
from guiderail.server.memory.shares import RewardShare
from guiderail.server.models.cpu_features import auto_dtype
from guiderail.server.rewards.models.reward_spec import RewardModelSpec

LEAST_TOKENS = 1024  # however little the operator gives
BLOCK = 128  # tokens, a multiple of vLLM's blocks


def device_and_dtype(device: str | None, dtype: str) -> tuple[str, Any]:
    """Return the device (None: the GPU if there is one, else the CPU) and torch's dtype, or "auto" for "stored".

    The dtype "auto" is bfloat16 on a GPU, on a CPU what server/models/cpu_features.py chooses; "stored" is what the
    model's files hold.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else auto_dtype()
    return device, "auto" if dtype == "stored" else getattr(torch, dtype)


def keep_to(share: RewardShare | None) -> None:
    """Hold this process to its part of a GPU's memory, where there is a plan of it."""
    if share is not None and share.limit is not None:
        import torch

        torch.cuda.set_per_process_memory_fraction(share.limit, share.device)


def pool_tokens(
    spec: RewardModelSpec,
    share: RewardShare | None,
    reads: int | None,
    kv_token: int,
    say: Callable[[str], None],
    *,
    on_cpu: bool,
) -> int:
    """Return the tokens whose keys and values a model keeps: as the operator says, as planned, or all that it reads.

    reads: tokens of the longest text (None: no limit). kv_token: bytes of one token. `say` hears of memory for less
    than it reads. Raises GuiderailError if there is next to none.
    """
    if spec.kv_gb is not None:
        kv = int(spec.kv_gb * GIB)
    elif share is not None and share.kv is not None:
        kv = share.kv
    else:
        kv = host_pool(reads, kv_token) if on_cpu else default_pool(reads, kv_token)
    tokens = max(LEAST_TOKENS, kv // kv_token)
    if reads is not None and tokens < reads:
        say(f"reward model {spec.path} reads {reads:,} tokens, but there is memory for {tokens:,} of them (see kv_gb)")
    return tokens


def pooling_settings(
    spec: RewardModelSpec, folder: str, share: RewardShare | None, say: Callable[[str], None]
) -> EngineSettings:
    """Return the settings of a pooling engine: with memory for less than its model reads it gets a shorter context."""
    cpu = on_cpu()
    dtype = auto_dtype() if cpu and spec.dtype == "auto" else spec.dtype
    found = read_shape(folder, dtype)
    longest, kv_token = (found.longest, max(1, found.kv_token)) if found else (None, 1)
    tokens = pool_tokens(spec, share, longest, kv_token, say, on_cpu=cpu)
    whole = tokens // BLOCK * BLOCK - BLOCK  # vLLM shares out whole blocks and keeps one for itself
    return EngineSettings(
        model=folder,
        dtype=spec.dtype,
        max_model_len=whole if longest is not None and whole < longest else None,
        kv_cache_gb=tokens * kv_token / GIB if cpu or spec.kv_gb is not None else None,
        gpu_memory_utilization=share.utilization if share is not None and share.utilization is not None else 0.9,
        device=int(share.device.removeprefix("cuda:")) if share is not None and not cpu else None,
    )
