"""Forced tokens for vLLM's V1 model runner: a sequence emits given tokens, so that their log-probabilities can be read.

vLLM reports the log-probabilities of the unprocessed logits, which forcing leaves alone. The V2 runner has the same as
`trace_decode_token_ids` (see params.forced_params).
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor

from guiderail.server.engines.vllm.params import FORCED


class ForcedTokens(LogitsProcessor):  # type: ignore[misc]
    """Logits processor that emits extra_args["guiderail_forced"], a list of token ids, whatever the logits."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _forced_and_output)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (forced, output) in self._rows.items():  # logits: [rows, vocabulary]
            if len(output) < len(forced):
                logits[row] = float("-inf")
                logits[row, forced[len(output)]] = 0.0
        return logits


def _forced_and_output(
    params: SamplingParams, prompt: list[int] | None, output: list[int]
) -> tuple[list[int], list[int]] | None:
    args: dict[str, Any] = params.extra_args or {}
    return (args[FORCED], output) if FORCED in args else None
