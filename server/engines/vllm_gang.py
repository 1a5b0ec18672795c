"""A vLLM scheduler that lets the rows of a group (mixed.py) begin in one step, so that they decode in lockstep.

Everything else is vLLM's. A group waits in front of vLLM's own queue until all its rows have come and can begin
together: free places, tokens of the step and KV blocks for all of them. Until then what came after it waits too,
so that no group starves. Preemption can still part a group; mixed.py deals with that.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from guiderail.server.engines.mixed import Recipe


class _Gate(Scheduler):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._coming: dict[str, list[Request]] = {}
        self._queue: deque[list[Request]] = deque()  # complete groups, and single rows behind one

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        recipe = None if params is None else Recipe.of(params.extra_args)
        if recipe is not None:
            group = self._coming.setdefault(recipe.group, [])
            group.append(request)
            if len(group) == recipe.size:
                self._queue.append(self._coming.pop(recipe.group))
        elif self._queue:
            self._queue.append([request])
        else:
            super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._queue:
            self._admit()
        return super().schedule(throttle_prefills)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        ids = {request_ids} if isinstance(request_ids, str) else None if request_ids is None else set(request_ids)
        gone = []
        for held in (*self._coming.values(), *self._queue):
            for request in [r for r in held if ids is None or r.request_id in ids]:
                held.remove(request)
                request.status = finished_status
                gone.append(request)
        if gone:
            self._coming = {name: held for name, held in self._coming.items() if held}
            self._queue = deque(held for held in self._queue if held)
        return [*gone, *super().finish_requests(ids, finished_status)]

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()
        return running, waiting + sum(map(len, self._queue))

    def _admit(self) -> None:
        """Hands on from the queue, in its order, what can begin in this step."""
        places = self.max_num_active_reqs - len(self.running)
        tokens = self.max_num_scheduled_tokens - sum(map(_tokens_left, self.running))
        blocks = self.kv_cache_manager.block_pool.get_num_free_blocks()
        # Rows that vLLM would begin first; those it has put off (for their grammars) are no hindrance.
        behind = len(self.waiting) + len(self.kv_holding_waiting) > len(self.deferred_waiting)
        idle = not self.running
        too_long = max(self.max_num_scheduled_tokens - self.max_num_active_reqs, self.max_num_scheduled_tokens // 2)
        later: list[list[Request]] = []
        while self._queue:
            rows = self._queue[0]
            if any(map(_waits_for_grammar, rows)):
                later.append(self._queue.popleft())
                continue
            if len(rows) > 1:
                need = sum(row.num_tokens - self.kv_cache_manager.get_computed_blocks(row)[1] for row in rows)
                pages = sum(-(-row.num_tokens // self.block_size) + 1 for row in rows)
                fits = len(rows) <= places and need <= tokens and pages <= blocks
                # What would not fit later either begins now: its rows part, but leave their prompts in the cache.
                if behind or not (fits or idle or need > too_long):
                    break
                places, tokens, blocks, idle = places - len(rows), tokens - need, blocks - pages, False
            else:
                behind = True
            for row in self._queue.popleft():
                super().add_request(row)
        self._queue.extendleft(reversed(later))


def _tokens_left(request: Request) -> int:
    """Tokens that a running row takes of this step, if it gets all it wants."""
    return int(request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens)


def _waits_for_grammar(request: Request) -> bool:
    return bool(
        request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        and request.structured_output_request is not None
        and request.structured_output_request.grammar is None
    )


class GroupScheduler(_Gate):
    """The gate in front of vLLM's plain scheduler."""


class AsyncGroupScheduler(_Gate, AsyncScheduler):  # type: ignore[misc]
    """The gate in front of vLLM's asynchronous scheduler."""
