"""A vLLM pooling engine as a reward model's backend: token sequences in, raw head values out.

For models whose architecture vLLM knows as a sequence classifier. vLLM batches and caches prefixes by itself;
activations are off, so that no sigmoid hides the values.
"""

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from guiderail.guides.core.errors import EngineUnavailable
from guiderail.server.engines.engine_stats import RunnerStats
from guiderail.server.engines.process_monitor import ProcessMonitor
from guiderail.server.engines.vllm.engine_args import EngineSettings, base_args
from guiderail.server.engines.vllm.environment import on_cpu, prepare_environment
from guiderail.server.engines.vllm.launch import end, start
from guiderail.server.memory.kv_pool import PASS_TOKENS

log = logging.getLogger("guiderail.engine")


async def build_pooling(settings: EngineSettings) -> "VllmPooler":
    """Start the engine's processes. Raises EngineUnavailable if it does not start."""
    prepare_environment()
    monitor = ProcessMonitor()
    llm = await asyncio.to_thread(_start, settings, monitor)
    try:
        await llm.collective_rpc("settle")
    except BaseException as error:
        cause = await monitor.cause() if llm.errored else None
        await end(llm)
        if cause is not None:
            raise EngineUnavailable(f"vLLM does not start with reward model {settings.model}: {cause}") from error
        raise
    return VllmPooler(llm, monitor)


def _start(settings: EngineSettings, monitor: ProcessMonitor) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        # A whole group of candidates should fit into one pass, so that its prefix is shared within it.
        args = base_args(settings, cpu=on_cpu()) | {"runner": "pooling", "max_num_batched_tokens": PASS_TOKENS}
        return start(AsyncEngineArgs(**args), monitor)
    except Exception as error:
        cause = str(error) or repr(error)  # some of vLLM's have no text
        raise EngineUnavailable(f"vLLM does not start with reward model {settings.model}: {cause}") from error


class VllmPooler:
    """Backend of a reward model over one AsyncLLM of pooling kind (Backend in rewards/models)."""

    def __init__(self, llm: Any, monitor: ProcessMonitor) -> None:
        self._llm = llm
        self._monitor = monitor
        self._reported = False
        self.heads = int(llm.model_config.hf_config.num_labels)
        self.dtype: Any = llm.model_config.dtype
        self.longest: int = llm.model_config.max_model_len
        self.stats = RunnerStats()

    @property
    def up(self) -> bool:
        """False once its process has died: it is not started again."""
        return self._llm is not None and not self._llm.errored

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return raw values [S][heads]. Raises RuntimeError if the engine is lost."""
        return await asyncio.gather(*(self._one(tokens) for tokens in sequences))

    async def _one(self, tokens: Sequence[int]) -> list[float]:
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        params = PoolingParams(task="classify", use_activation=False)
        last: Any = None
        try:
            async for output in self._llm.encode(tokens_input(list(tokens)), params, uuid.uuid4().hex):
                last = output
        except EngineDeadError as error:
            # Not EngineUnavailable: that is the policy's engine, which is started again.
            cause = await self._monitor.cause()
            if not self._reported:
                self._reported = True
                log.error("a reward model's engine died: %s", cause)
            raise RuntimeError(f"the reward model's engine died: {cause}") from error
        cached = last.num_cached_tokens or 0
        self.stats.tokens_asked += len(tokens)
        self.stats.tokens_cached += cached
        self.stats.tokens_computed += len(tokens) - cached
        self.stats.passes += 1
        values: list[float] = last.outputs.data.float().tolist()
        return values

    async def close(self) -> None:
        """End the engine's processes."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            await end(llm)
