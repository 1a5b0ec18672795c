"""Mixed policies for vLLM's V2 model runner, which keeps a request's state in a slot and orders rows anew each step.

Bias and penalties have been applied when this runs. The length of a sequence shows whether it is still in its prompt;
if so, the runner discards its token.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from guiderail.server.engines.vllm.mixture.mixing import Row, emit, warm_up
from guiderail.server.engines.vllm.mixture.recipe import Recipe


class MixedPolicies(LogitsProcessor):  # type: ignore[misc]
    """Logits processor that makes the sequences of a group emit one token, drawn from the mixture of their policies."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._prompt_len: Any = req_states.prompt_len.np
        self._prefill_len: Any = req_states.prefill_len.np
        self._slots: dict[int, Recipe] = {}
        if req_states.device.type == "cuda":
            warm_up(req_states.vocab_size, req_states.device)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._slots.pop(req_idx, None)
        recipe = Recipe.of(sampling_params.extra_args)
        if recipe is None:
            return False
        self._slots[req_idx] = recipe
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        slots = ctx.idx_mapping_np.tolist()
        lengths = ctx.seq_lens_upper_bound_np.tolist()
        mixed = [(i, slot, self._slots[slot]) for i, slot in enumerate(slots) if slot in self._slots]
        if mixed and logits.shape[0] != len(slots):
            raise RuntimeError("mixed policies need one row of logits per request: no speculative decoding")
        rows = [
            Row(i, recipe, lengths[i] - int(self._prompt_len[slot]))
            for i, slot, recipe in mixed
            if lengths[i] >= self._prefill_len[slot]
        ]
        if rows:
            emit(logits, rows)
        return logits
