"""Engine arguments: what our settings become for vLLM, on CPU and on a GPU.

On a GPU an engine is started as `vllm serve` starts it (chunked prefill, prefix caching, asynchronous scheduling, CUDA
graphs and their sizes, sizes of batches), except that: waiting sequences start in order of priority; the scheduler and
logits processors are ours; there are 50 log-probabilities instead of 20; sampling defaults are OpenAI's instead of the
model's; the log has no statistics; and memory is limited to the engine's share.
"""

from dataclasses import dataclass
from typing import Any

from guiderail.server.engines.vllm.environment import on_cpu, prepare_environment
from guiderail.server.models.cpu_features import auto_dtype

IN_SCHEDULERS_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"  # by its short name vLLM takes it for "mp"
CPU_KV_GB = 2.0  # GiB
LONGEST_WHOLE_PROMPT = 32768  # tokens; a longer context keeps vLLM's chunked prefill, also on CPU


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of one engine.

    kv_cache_gb: GiB; None is CPU_KV_GB on CPU, and on a GPU what is left of the share. gpu_memory_utilization: the
    engine's share of a whole GPU. max_num_seqs, max_num_batched_tokens, enforce_eager: None is the default of
    `vllm serve`, except that the CPU runs eager. adapters: names and folders of LoRA adapters. device: number of the
    GPU; None is the first. batch_invariant: see batch_invariance.py; on CPU only float32 is then accepted.
    float32_logits: also for a model in 16 bits (float32_head.py).
    """

    model: str
    dtype: str = "auto"
    max_model_len: int | None = None
    seed: int = 0
    kv_cache_gb: float | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enforce_eager: bool | None = None
    tensor_parallel_size: int = 1
    adapters: tuple[tuple[str, str], ...] = ()
    max_lora_rank: int = 16
    max_logprobs: int = 50
    device: int | None = None
    batch_invariant: bool = False
    float32_logits: bool = True


def default_max_num_seqs(tensor_parallel_size: int) -> int:
    """Return the number of sequences that `vllm serve` decodes at once on this machine by default."""
    prepare_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs

    return int(AsyncEngineArgs.get_batch_defaults(tensor_parallel_size)[1][usage_context()])


def usage_context() -> Any:
    """Return what vLLM takes us for. Without it batches are a quarter of those of `vllm serve` on a large GPU."""
    from vllm.usage.usage_lib import UsageContext

    return UsageContext.OPENAI_API_SERVER


def base_args(settings: EngineSettings, *, cpu: bool) -> dict[str, Any]:
    """Return the arguments that generating and pooling engines share, for vLLM on CPU or on GPUs."""
    args: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "seed": settings.seed,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": "guiderail.server.engines.vllm.worker.WorkerExtension",
        "generation_config": "vllm",  # what a request does not say is OpenAI's default, not the model's
    }
    kv_cache_gb = settings.kv_cache_gb
    if cpu:
        args["block_size"] = 32  # the default of 128 caches no prompt below 128 tokens
        args["enforce_eager"] = settings.enforce_eager is not False  # compiling takes most of a minute
        kv_cache_gb = CPU_KV_GB if kv_cache_gb is None else kv_cache_gb
        if args["dtype"] == "auto":
            args["dtype"] = "float32" if settings.batch_invariant else auto_dtype()
        if settings.batch_invariant and args["dtype"] not in ("float32", "float"):
            raise ValueError(f"batch invariance on CPU needs dtype float32 or auto, not {args['dtype']}")
        if settings.tensor_parallel_size == 1:
            args["distributed_executor_backend"] = IN_SCHEDULERS_PROCESS
    else:
        args["enforce_eager"] = bool(settings.enforce_eager)
        args["gpu_memory_utilization"] = settings.gpu_memory_utilization
        if settings.device is not None:
            args["device_ids"] = [settings.device]
    if kv_cache_gb is not None:
        args["kv_cache_memory_bytes"] = int(kv_cache_gb * 2**30)
    return args


def generating_args(settings: EngineSettings, *, cpu: bool) -> dict[str, Any]:
    """Return the arguments of a generating engine that do not depend on the model."""
    from vllm.config import StructuredOutputsConfig

    # Of waiting sequences those of the smallest priority start first (see params.sequence_priority).
    args = base_args(settings, cpu=cpu) | {"max_logprobs": settings.max_logprobs, "scheduling_policy": "priority"}
    # By itself vLLM takes for all answers the library that suits the first schema that comes. This one makes a grammar
    # in milliseconds, where others take seconds that everybody waits for, and limits its work (bounded/grammar.py).
    args["structured_outputs_config"] = StructuredOutputsConfig(backend="guidance")
    if settings.adapters:
        # One slot more than adapters: vLLM's CPU path gives sequences without adapter the weights of the last slot
        # when another one of the batch has an adapter. Unused, that slot holds zeros, which is what they need.
        args |= {"enable_lora": True, "max_loras": len(settings.adapters) + 1, "max_lora_rank": settings.max_lora_rank}
    if settings.float32_logits:
        args["hf_overrides"] = {"head_dtype": "float32"}
    return args


def fitting_args(settings: EngineSettings, *, cpu: bool, max_model_len: int, async_scheduling: bool, v2: bool) -> Any:
    """Return the arguments that depend on what vLLM makes of the others: context, scheduling and model runner.

    Raises ValueError for a step that is too small for prompts that it must prefill whole.
    """
    args: dict[str, Any] = {}
    if cpu and max_model_len <= LONGEST_WHOLE_PROMPT:
        # vLLM 0.32 on CPU dies of a seeded sequence whose prompt is split over two steps ("CPU Generator does not use
        # offset"): every prompt is prefilled in one step.
        whole = settings.max_num_batched_tokens or max(2048, max_model_len)
        if whole < max_model_len:
            raise ValueError(f"on CPU max_num_batched_tokens must hold a whole prompt, up to {max_model_len} tokens")
        args |= {"enable_chunked_prefill": False, "max_num_batched_tokens": whole}
    here = "guiderail.server.engines.vllm"
    args["scheduler_cls"] = (
        f"{here}.scheduling.scheduler.{'AsyncGroupScheduler' if async_scheduling else 'GroupScheduler'}"
    )
    if v2:
        return args | {"enable_trace_replay": True, "logits_processors": [f"{here}.mixture.runner_v2:MixedPolicies"]}
    processors = ["mixture.runner_v1:MixedPolicies", "forced_tokens:ForcedTokens"]
    return args | {"logits_processors": [f"{here}.{name}" for name in processors]}


def engine_args(settings: EngineSettings) -> Any:
    """Return vLLM's AsyncEngineArgs of a generating engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    cpu = on_cpu()
    args = generating_args(settings, cpu=cpu)
    config = AsyncEngineArgs(**args).create_engine_config(usage_context())
    return AsyncEngineArgs(
        **args
        | fitting_args(
            settings,
            cpu=cpu,
            max_model_len=config.model_config.max_model_len,
            async_scheduling=bool(config.scheduler_config.async_scheduling),
            v2=bool(config.use_v2_model_runner),
        )
    )
