"""Internals of vLLM that scheduling/ stands on: after an upgrade this test says which are gone or have changed."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import vllm
from played import Played
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from guiderail.server.engines.vllm.scheduling.scheduler import AsyncGroupScheduler, GroupScheduler
from guiderail.server.engines.vllm.scheduling.scheduler_state import SchedulerState

METHODS = {  # with the parameters that we pass on or call with
    "schedule": ["self", "throttle_prefills"],
    "add_request": ["self", "request"],
    "_enqueue_waiting_request": ["self", "request"],
}
REQUEST = (
    "is_finished", "num_computed_tokens", "num_output_placeholders", "num_tokens", "num_tokens_with_spec", "priority",
    "request_id", "sampling_params", "status", "structured_output_request",
)  # fmt: skip
STATE = ("running", "waiting", "max_tokens", "max_sequences", "chunks_prefills", "block_size", "free_blocks")


@pytest.mark.parametrize("kind", [GroupScheduler, AsyncGroupScheduler])
def test_vllm_has_what_the_scheduler_stands_on(kind: type[Any], model_path: str) -> None:
    lost: list[str] = []

    def tried(name: str, look: Callable[[], object]) -> None:
        try:
            look()
        except (AttributeError, TypeError, KeyError, IndexError) as error:
            lost.append(f"{name}: {error}")

    for name, parameters in METHODS.items():
        found = list(inspect.signature(getattr(Scheduler, name, lambda: None)).parameters)
        if found != parameters:
            lost.append(f"Scheduler.{name} takes {found}, not {parameters}")
    if "scheduled_new_reqs" not in SchedulerOutput.__annotations__:
        lost.append("SchedulerOutput.scheduled_new_reqs")
    assert not lost, said(lost)
    played = Played(model_path, kind)
    scheduler, request = played.scheduler, played.add("r", 40)
    state = SchedulerState(scheduler)
    for name in STATE:
        tried(f"SchedulerState.{name}", lambda name=name: getattr(state, name))
    tried("SchedulerState.uncached_tokens", lambda: state.uncached_tokens(request))
    for name in REQUEST:
        tried(f"Request.{name}", lambda name=name: getattr(request, name))
    if state.waiting != [request]:
        lost.append("Scheduler.waiting does not hold what was added")
    tried("Scheduler.waiting.remove_requests", lambda: scheduler.waiting.remove_requests([request]))
    tried("Scheduler.deferred_waiting", lambda: scheduler.deferred_waiting.difference_update([request]))
    if played.step():
        lost.append("Scheduler.schedule starts sequences that are in no queue")
    tried("Scheduler._enqueue_waiting_request", lambda: scheduler._enqueue_waiting_request(request))
    most, scheduler.max_num_scheduled_tokens = scheduler.max_num_scheduled_tokens, 15
    if played.step() != {"r": 15}:
        lost.append("Scheduler.schedule does not heed max_num_scheduled_tokens")
    scheduler.max_num_scheduled_tokens, running, scheduler.running = most, scheduler.running, []
    if played.step():
        lost.append("Scheduler.schedule runs sequences that are not in `running`")
    scheduler.running = running
    if played.step() != {"r": 25}:
        lost.append("Scheduler.schedule forgets a sequence that was out of `running` for a step")
    assert not lost, said(lost)


def said(lost: list[str]) -> str:
    where = "server/engines/vllm/scheduling/scheduler.py"
    return f"vLLM {vllm.__version__} has changed under {where}:\n" + "\n".join(lost)
