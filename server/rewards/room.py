"""How much memory a reward model that runs here gets for keys and values, and how long a text it reads with that."""

from collections.abc import Callable

from guiderail.server.engines.vllm_args import EngineSettings, on_cpu
from guiderail.server.memory.model_size import shape, width
from guiderail.server.memory.pool import GIB, default_pool, host_pool
from guiderail.server.memory.shares import RewardShare
from guiderail.server.processor import auto_dtype
from guiderail.server.rewards.spec import RewardModelSpec

BLOCK = 128  # tokens, a multiple of vLLM's blocks


def pool_bytes(
    spec: RewardModelSpec,
    share: RewardShare | None,
    longest: int | None,
    kv_token: int,
    say: Callable[[str], None],
    *,
    on_cpu: bool,
) -> int:
    """Memory for a reward model's keys and values: as the operator says, as was planned, or what it reads."""
    if spec.kv_gb is not None:
        return int(spec.kv_gb * GIB)
    if share is not None and share.kv is not None:
        return share.kv
    if on_cpu:
        return host_pool(longest, kv_token, lambda text: say(f"reward model {spec.path}: {text}"))
    return default_pool(longest, kv_token)


def pooling_settings(
    spec: RewardModelSpec, folder: str, share: RewardShare | None, say: Callable[[str], None]
) -> EngineSettings:
    """How a pooling engine is started. One whose memory is less than the model reads gets a shorter context."""
    from transformers import AutoConfig

    cpu = on_cpu()
    dtype = auto_dtype() if cpu and spec.dtype == "auto" else spec.dtype
    found = shape(AutoConfig.from_pretrained(folder), width(dtype))
    kv = pool_bytes(spec, share, found.longest, found.kv_token, say, on_cpu=cpu)
    room = kv // found.kv_token // BLOCK * BLOCK - BLOCK  # whole blocks, and vLLM keeps one for itself
    return EngineSettings(
        model=folder,
        dtype=spec.dtype,
        max_model_len=room if found.longest is not None and room < found.longest else None,
        kv_cache_gb=kv / GIB if cpu or spec.kv_gb is not None else None,
        gpu_memory_utilization=share.utilization if share is not None and share.utilization is not None else 0.9,
        device=int(share.device.removeprefix("cuda:")) if share is not None and not cpu else None,
    )
