"""Joint of our scheduling policies with vLLM's schedulers, the file to look at first when vLLM is upgraded.

It stands on these internals of vLLM 0.32, which tests/server/engines/scheduling/test_internals.py checks:
- `Scheduler.schedule` starts sequences from `waiting` in its order, and reads `running` and `max_num_scheduled_tokens`
  anew at each call: what is taken out of them for the time of the call does not exist for it;
- `waiting.remove_requests`, `deferred_waiting` and `_enqueue_waiting_request` take sequences out of the queue and put
  them back; `kv_holding_waiting` are those of them that start first;
- what SchedulerState reads of the scheduler and of its requests (scheduler_state.py).
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from guiderail.server.engines.process_monitor import end_with_parent
from guiderail.server.engines.vllm.scheduling.group_admission import GroupAdmission
from guiderail.server.engines.vllm.scheduling.scheduler_state import SchedulerState
from guiderail.server.engines.vllm.scheduling.short_steps import ShortSteps


class _WithPolicies(Scheduler):  # type: ignore[misc]
    max_num_scheduled_tokens: int
    running: list[Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()  # of all that is ours, this alone is in vLLM's core process wherever the model is
        self.admission = GroupAdmission()
        self.short_steps = ShortSteps()

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        self.admission.add(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        state = SchedulerState(self)
        held = self.admission.hold(state) if self.admission.pending else []
        if held:
            self.waiting.remove_requests(held)
            self.deferred_waiting.difference_update(held)
        most, running = self.max_num_scheduled_tokens, self.running
        limit, sit_out = self.short_steps.plan(state, unlimited=self.admission.pending)
        self.max_num_scheduled_tokens = limit
        if out := set(sit_out):
            self.running = [each for each in running if each not in out]
        try:
            output = super().schedule(throttle_prefills)
            self.short_steps.note_started(self.requests[each.req_id] for each in output.scheduled_new_reqs)
            return output
        finally:
            self.max_num_scheduled_tokens = most
            if sit_out:
                self.running = sit_out + self.running
            for request in held:
                self._enqueue_waiting_request(request)


class GroupScheduler(_WithPolicies):
    """vLLM's plain scheduler with our policies."""


class AsyncGroupScheduler(_WithPolicies, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler with our policies."""
