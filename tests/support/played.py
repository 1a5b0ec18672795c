"""vLLM's scheduler with ours on top and the engine's loop around it; the model runner is played."""

from collections import Counter
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from guiderail.server.engines.vllm.mixture.recipe import Recipe
from guiderail.server.engines.vllm.scheduling.scheduler import AsyncGroupScheduler, GroupScheduler

BLOCK = 32


class Played:
    """A scheduler with its engine's loop around it. 4 places, 256 tokens a step."""

    def __init__(self, model: str, kind: type = GroupScheduler, blocks: int = 200, **more: Any) -> None:
        config = EngineArgs(
            model=model, max_model_len=1024, block_size=BLOCK, dtype="bfloat16", enforce_eager=True,
            async_scheduling=kind is AsyncGroupScheduler, scheduling_policy="priority",
            **{"max_num_seqs": 4, "max_num_batched_tokens": 256, **more},
        ).create_engine_config()  # fmt: skip
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler: Any = kind(config, cache, StructuredOutputManager(config), block_size=BLOCK)
        self.emitted: Counter[str] = Counter()

    def add(
        self, name: str, prompt: int, *, recipe: Recipe | None = None, first: int = 1, priority: int = 0, **params: Any
    ) -> Request:
        """A request of `prompt` tokens, which begin with `first` to tell prompts apart."""
        sampling = SamplingParams(
            extra_args=recipe and recipe.extra_args(), **({"max_tokens": 50, "ignore_eos": True} | params)
        )
        sampling.update_from_generation_config({}, eos_token_id=0)
        request = Request(name, [first] * prompt, sampling, None, priority=priority, block_hasher=self.hasher)
        self.scheduler.add_request(request)
        return request

    def group(self, name: str, prompts: tuple[int, ...], **params: Any) -> None:
        for role, prompt in enumerate(prompts):
            self.add(f"{name}{role}", prompt, recipe=Recipe(name, role, len(prompts)), first=100 + role, **params)

    def step(self) -> dict[str, int]:
        """One step of the engine: the tokens scheduled of each sequence."""
        output = self.scheduler.schedule()
        sequences = list(output.num_scheduled_tokens)
        sampled = []
        for name in sequences:
            request = self.scheduler.requests[name]
            done = not request.is_prefill_chunk
            self.emitted[name] += done
            sampled.append([7] if done else [])
        self.scheduler.update_from_output(
            output, ModelRunnerOutput(sequences, {name: i for i, name in enumerate(sequences)}, sampled)
        )
        return dict(output.num_scheduled_tokens)

    def in_step(self, name: str, size: int) -> bool:
        return len({self.emitted[f"{name}{role}"] for role in range(size)}) == 1
