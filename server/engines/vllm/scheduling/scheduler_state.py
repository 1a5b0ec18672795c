"""State of vLLM's scheduler before a step, as our policies read it."""

from typing import Any

from vllm.v1.request import Request, RequestStatus

from guiderail.server.engines.vllm.mixture.recipe import Recipe
from guiderail.server.engines.vllm.params import PRIORITY_STRIDE


class SchedulerState:
    """Reads a vLLM Scheduler; nothing is copied, so values change as it goes on."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    @property
    def running(self) -> list[Request]:
        """Sequences that have started, in the order in which vLLM schedules them."""
        return self._scheduler.running  # type: ignore[no-any-return]

    @property
    def waiting(self) -> list[Request]:
        """Sequences that wait, in the order in which vLLM starts them."""
        return [*self._scheduler.kv_holding_waiting, *self._scheduler.waiting]

    @property
    def max_tokens(self) -> int:
        """Tokens that one step may compute."""
        return int(self._scheduler.max_num_scheduled_tokens)

    @property
    def max_sequences(self) -> int:
        """Sequences that may run at once."""
        return int(self._scheduler.max_num_active_reqs)

    @property
    def chunks_prefills(self) -> bool:
        """True if vLLM splits a prompt over several steps."""
        return bool(self._scheduler.scheduler_config.enable_chunked_prefill)

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        return int(self._scheduler.block_size)

    @property
    def free_blocks(self) -> int:
        """KV blocks that are free, those of cached prefixes included."""
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def uncached_tokens(self, request: Request) -> int:
        """Return the tokens of a waiting sequence that are not in the prefix cache."""
        return int(request.num_tokens - self._scheduler.kv_cache_manager.get_computed_blocks(request)[1])


def recipe_of(request: Request) -> Recipe | None:
    """Return the recipe of a mixture's sequence, None for any other."""
    params = request.sampling_params
    return None if params is None else Recipe.of(params.extra_args)


def is_plain(request: Request) -> bool:
    """Return True for a sequence that runs alone, as plain chats do (params.sequence_priority)."""
    return bool(request.priority % PRIORITY_STRIDE == 0)


def tokens_left(request: Request) -> int:
    """Return the tokens of this step that a sequence takes, if it gets all it can use."""
    return int(request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens)


def waits_for_grammar(request: Request) -> bool:
    """Return True until the grammar of a sequence's response format is compiled."""
    return bool(
        request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        and request.structured_output_request is not None
        and request.structured_output_request.grammar is None
    )
