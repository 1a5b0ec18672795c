"""How a vLLM engine is started: settings, environment, engine arguments, processes.

On CPU the model runs in the process of vLLM's scheduler. vLLM would put it into one of its own there, for OpenMP reads
its settings when a process starts; `start` gives them to the scheduler's. That saves the memory and the start of one
process, and the CPU time that a scheduler takes from the model while it polls for the end of each step.

On a GPU an engine is started as `vllm serve` starts it (chunked prefill, prefix caching, asynchronous scheduling,
CUDA graphs and their sizes, sizes of batches), but for: rows that wait begin by priority, a scheduler and logits
processors of ours, 50 log-probabilities instead of 20, OpenAI's sampling defaults instead of the model's, no statistics
in the log, and its share of the memory.
"""

import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from guiderail.guides.core.errors import EngineUnavailable
from guiderail.server.engines.process_monitor import ProcessMonitor
from guiderail.server.models.cpu_features import auto_dtype

IN_SCHEDULERS_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"  # by its short name vLLM takes it for "mp"
CPU_KV_GB = 2.0  # GiB
LONGEST_WHOLE_PROMPT = 32768  # tokens; a longer context keeps vLLM's chunked prefill, also on CPU


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to start the engine. `adapters` maps LoRA names to folders of the operator's choice.

    kv_cache_gb: None is CPU_KV_GB on CPU, on a GPU what the share has left. gpu_memory_utilization: the engine's share
    of a whole GPU. max_num_seqs, max_num_batched_tokens, enforce_eager: None is what `vllm serve` takes there, but that
    the CPU runs eager. device: the GPU of an engine that is not to be on the first.
    batch_invariant: see batch_invariance.py; on CPU only float32 is then accepted. float32_logits: also for a model
    in 16 bits (float32_head.py).
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


def prepare_environment() -> None:
    """Sets what vLLM reads from the environment, unless the operator has. Must precede its import."""
    cores = sorted(os.sched_getaffinity(0))
    # With "auto" vLLM keeps a core for its scheduler; on a small machine that is half of it.
    bind = ",".join(map(str, cores)) if len(cores) <= 4 else "auto"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bind)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A worker looks through torch's modules as it starts, and meets a deprecated name.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:vllm.triton_utils.dispatcher")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # vLLM's default is to fork until CUDA has been used, and this process has threads by then. As `vllm serve` sets it.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # no process of ours takes the folder kernels/ for a package
    # Intel's OpenMP, where it is installed, gives 8 to 18% more tokens/s on 2 cores than the default that
    # vLLM would preload. It acts on the processes that vLLM starts.
    preload = os.environ.get("LD_PRELOAD", "")
    with suppress(PackageNotFoundError):
        for file in files("intel-openmp") or ():
            if file.name == "libiomp5.so" and "omp" not in preload:
                library = str(Path(str(file.locate())).resolve())
                os.environ["LD_PRELOAD"] = f"{library}:{preload}" if preload else library


def on_cpu() -> bool:
    """Whether the vLLM that is installed runs on CPUs."""
    prepare_environment()
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def usual_rows(tensor_parallel_size: int) -> int:
    """How many rows `vllm serve` decodes at once on this machine if it is not told."""
    prepare_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs

    return int(AsyncEngineArgs.get_batch_defaults(tensor_parallel_size)[1][_usage()])


def _usage() -> Any:
    """What vLLM takes us for. Without it batches are a quarter of what `vllm serve` has on a large GPU."""
    from vllm.usage.usage_lib import UsageContext

    return UsageContext.OPENAI_API_SERVER


def base_args(settings: EngineSettings, *, cpu: bool) -> dict[str, Any]:
    """Engine arguments that generating and pooling engines share, for vLLM on CPU or on GPUs."""
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
    """Engine arguments of a generating engine, as far as they need no look at the model."""
    # Among rows that wait, those of the smallest priority begin first (see vllm.row_priority).
    args = base_args(settings, cpu=cpu) | {"max_logprobs": settings.max_logprobs, "scheduling_policy": "priority"}
    if settings.adapters:
        # One slot more than adapters: vLLM's CPU path gives rows without adapter the weights of the last
        # slot when another row of the batch has one. Unused, that slot holds zeros, which is what they need.
        args |= {"enable_lora": True, "max_loras": len(settings.adapters) + 1, "max_lora_rank": settings.max_lora_rank}
    if settings.float32_logits:
        args["hf_overrides"] = {"head_dtype": "float32"}
    return args


def fitting_args(settings: EngineSettings, *, cpu: bool, max_model_len: int, async_scheduling: bool, v2: bool) -> Any:
    """Engine arguments that depend on what vLLM makes of the others: context, scheduling, and which model runner.

    Raises ValueError for a step that is too small for the prompts that it must read whole.
    """
    args: dict[str, Any] = {}
    if cpu and max_model_len <= LONGEST_WHOLE_PROMPT:
        # vLLM 0.32 on CPU dies of a seeded row whose prompt is split over two steps ("CPU Generator does not use
        # offset"): every prompt is read in one step.
        whole = settings.max_num_batched_tokens or max(2048, max_model_len)
        if whole < max_model_len:
            raise ValueError(f"on CPU max_num_batched_tokens must hold a whole prompt, up to {max_model_len} tokens")
        args |= {"enable_chunked_prefill": False, "max_num_batched_tokens": whole}
    here = "guiderail.server.engines.vllm"
    args["scheduler_cls"] = f"{here}.scheduler.{'AsyncGroupScheduler' if async_scheduling else 'GroupScheduler'}"
    if v2:
        return args | {"enable_trace_replay": True, "logits_processors": [f"{here}.mixture.runner_v2:MixedPolicies"]}
    processors = ["mixture.runner_v1:MixedPolicies", "forced_tokens:ForcedTokens"]
    return args | {"logits_processors": [f"{here}.{name}" for name in processors]}


def engine_args(settings: EngineSettings) -> Any:
    """vLLM's AsyncEngineArgs of a generating engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    cpu = on_cpu()
    args = generating_args(settings, cpu=cpu)
    config = AsyncEngineArgs(**args).create_engine_config(_usage())
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


def start(args: Any, words: ProcessMonitor, stat_loggers: list[Any] | None = None) -> Any:
    """An AsyncLLM of these AsyncEngineArgs, whose processes `words` listens to. Blocks for its start.

    Raises EngineUnavailable with their cause if the processes end, else whatever vLLM does.
    """
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.engine.async_llm import AsyncLLM

    from guiderail.server.engines.vllm.forkserver import forked_engine

    config = args.create_engine_config(_usage())
    with ExitStack() as stack:
        stack.enter_context(words.listen())
        if args.distributed_executor_backend == IN_SCHEDULERS_PROCESS:
            stack.enter_context(OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0))
            stack.enter_context(forked_engine())
        try:
            llm = AsyncLLM.from_vllm_config(
                config,
                usage_context=_usage(),
                stat_loggers=stat_loggers,
                disable_log_stats=bool(args.disable_log_stats),
            )
        except RuntimeError as error:
            if "core proc" not in str(error):
                raise
            failure = error
        else:
            return llm
    raise EngineUnavailable(words.cause()) from failure
