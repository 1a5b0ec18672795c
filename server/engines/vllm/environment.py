"""Environment of vLLM's processes: what it reads there when it is imported, and which platform it was built for."""

import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


def prepare_environment() -> None:
    """Set what vLLM reads from the environment, unless the operator has. Must precede its import."""
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
    """Return True if the installed vLLM runs on CPUs."""
    prepare_environment()
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
