"""Mixed policies for vLLM's V1 model runner, which keeps a sequence in one row of its batch."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor
from vllm.v1.sample.ops.penalties import apply_all_penalties

from guiderail.server.engines.vllm.mixture.mixing import Row, emit, warm_up
from guiderail.server.engines.vllm.mixture.recipe import Recipe

REMEMBERED = 4096  # groups


@dataclass(slots=True)
class _Entry:
    """A sequence in the batch. `output` is the runner's own list, which grows with it."""

    recipe: Recipe
    params: SamplingParams
    prompt: list[int]
    output: list[int]


class MixedPolicies(LogitsProcessor):  # type: ignore[misc]
    """Logits processor that makes the sequences of a group emit one token, drawn from the mixture of their policies.

    The interface does not say whether a sequence is still in its prompt (a long one can take several steps), when its
    logits mean nothing. Its partners may draw with them, but they have grown and it has not, so it is out of step at
    that place and emits a token that none of them has emitted there.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Entry] = {}
        # By group and role; kept for a while after the sequences left, for partners that come back late.
        self._outputs: OrderedDict[str, dict[int, list[int]]] = OrderedDict()
        if device.type == "cuda":
            warm_up(vllm_config.model_config.get_vocab_size(), device)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._entry)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._rows:
            return logits
        for index, entry in self._rows.items():
            if entry.recipe.role == 0:
                _penalise(logits[index : index + 1], entry)
        emit(logits, (Row(i, e.recipe, len(e.output)) for i, e in self._rows.items()), self._emitted)
        return logits

    def _entry(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> _Entry | None:
        recipe = Recipe.of(params.extra_args)
        if recipe is None:
            return None
        self._outputs.setdefault(recipe.group, {})[recipe.role] = output
        self._outputs.move_to_end(recipe.group)
        while len(self._outputs) > max(REMEMBERED, len(self._rows)):
            self._outputs.popitem(last=False)
        return _Entry(recipe, params, prompt or [], output)

    def _emitted(self, row: Row) -> set[int]:
        outputs = self._outputs.get(row.recipe.group, {})
        return {o[row.position] for r, o in outputs.items() if r != row.recipe.role and len(o) > row.position}


def _penalise(logits: Any, entry: _Entry) -> None:
    """Apply the sequence's penalties to logits [1, V], in place.

    vLLM does so only after this processor, when one token is left and they have no effect.
    """
    params = entry.params
    if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
        values = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        tensors = [torch.tensor([value], device=logits.device) for value in values]
        prompt = torch.tensor([entry.prompt], device=logits.device)
        apply_all_penalties(logits, prompt, *tensors, [entry.output])
