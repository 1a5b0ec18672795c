"""Start and end of an AsyncLLM and its processes.

On CPU the model runs in the process of vLLM's scheduler. vLLM would give it a process of its own there, because OpenMP
reads its settings when a process starts; `start` passes them to the scheduler's process instead. That saves one
process's memory and start, and the CPU time that a scheduler takes from the model while it polls for the end of a step.
"""

import asyncio
from contextlib import ExitStack
from typing import Any

from guiderail.guides.core.errors import EngineUnavailable
from guiderail.server.engines.process_monitor import ProcessMonitor
from guiderail.server.engines.vllm.engine_args import IN_SCHEDULERS_PROCESS, usage_context
from guiderail.server.engines.vllm.forkserver import forked_engine


def start(args: Any, monitor: ProcessMonitor, stat_loggers: list[Any] | None = None) -> Any:
    """Return an AsyncLLM of these AsyncEngineArgs, its processes watched by `monitor`. Blocks until it has started.

    Raises EngineUnavailable with the cause if its processes end, else whatever vLLM raises.
    """
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.engine.async_llm import AsyncLLM

    config = args.create_engine_config(usage_context())
    with ExitStack() as stack:
        stack.enter_context(monitor.watch())
        if args.distributed_executor_backend == IN_SCHEDULERS_PROCESS:
            stack.enter_context(OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0))
            stack.enter_context(forked_engine())
        try:
            llm = AsyncLLM.from_vllm_config(
                config,
                usage_context=usage_context(),
                stat_loggers=stat_loggers,
                disable_log_stats=bool(args.disable_log_stats),
            )
        except RuntimeError as error:
            if "core proc" not in str(error):
                raise
            failure = error
        else:
            return llm
    raise EngineUnavailable(monitor.wait_for_cause()) from failure


async def end(llm: Any) -> None:
    """End an AsyncLLM and its processes. Takes some seconds."""
    if llm.output_handler is not None:  # else it reports the end we are making as a death
        llm.output_handler.cancel()
    await asyncio.to_thread(llm.shutdown, 5)
    # Its __del__ calls shutdown once more, at the interpreter's exit when what it needs is gone.
    llm.shutdown = lambda timeout=None: None
