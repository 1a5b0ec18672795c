"""Group admission: sequences of a mixture begin in one step. vLLM's own scheduler is beneath, the model runner played."""

from typing import Any

import pytest
from played import Played
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import Request, RequestStatus

from guiderail.server.engines.vllm.mixture.recipe import Recipe
from guiderail.server.engines.vllm.scheduling.scheduler import AsyncGroupScheduler, GroupScheduler


@pytest.fixture(params=[GroupScheduler, AsyncGroupScheduler], ids=["plain", "async"])
def played(request: pytest.FixtureRequest, model_path: str) -> Played:
    return Played(model_path, request.param)


def test_a_group_waits_for_its_last_sequence(played: Played) -> None:
    played.add("a0", 10, recipe=Recipe("a", 0, 2))
    assert played.step() == {}
    assert played.step() == {}
    assert played.scheduler.has_requests()
    played.add("a1", 20, recipe=Recipe("a", 1, 2))
    assert played.scheduler.get_num_unfinished_requests() == 2
    assert played.step() == {"a0": 10, "a1": 20}
    assert played.step() == {"a0": 1, "a1": 1}


def test_a_group_waits_for_places_and_what_follows_waits_for_it(played: Played) -> None:
    for i in range(3):
        played.add(f"s{i}", 5, first=i + 1, max_tokens=3 + i)
    played.step()
    played.group("a", (10, 10))
    played.add("late", 5, first=9)
    assert set(played.step()) == {"s0", "s1", "s2"}, "one place is free, and the group needs two"
    steps = [played.step() for _ in range(12)]
    together = next(i for i, step in enumerate(steps) if "a0" in step)
    assert "a1" in steps[together]
    assert "late" not in steps[together - 1]
    assert any("late" in step for step in steps[together:])
    assert played.in_step("a", 2)


def test_a_group_waits_until_its_prompts_fit_into_one_step(played: Played) -> None:
    played.add("long", 500)
    assert played.step() == {"long": 256}
    played.group("a", (60, 60))
    step = played.step()
    assert step == {"long": 244}, "12 tokens are left; one sequence alone would begin"
    assert played.step() == {"long": 1, "a0": 60, "a1": 60}


def test_groups_begin_together_while_they_fit(played: Played) -> None:
    played.group("a", (20, 20))
    played.group("b", (20, 20))
    played.group("c", (20, 20))
    assert list(played.step()) == ["a0", "a1", "b0", "b1"]
    assert list(played.step()) == ["a0", "a1", "b0", "b1"], "four places"


def test_a_group_waits_for_kv_blocks(model_path: str) -> None:
    played = Played(model_path, blocks=10)
    played.add("s", 200, max_tokens=2)
    played.step()
    played.group("a", (40, 40))
    assert played.step() == {"s": 1}
    assert played.step() == {"a0": 40, "a1": 40}


def test_prompts_too_long_for_a_step_are_cached_for_the_next_try(played: Played) -> None:
    """The sequences part (which lockstep.py sees), and start together when they come again."""
    played.group("a", (200, 210))
    while not (played.emitted["a0"] and played.emitted["a1"]):
        played.step()
    assert not played.in_step("a", 2)
    played.scheduler.finish_requests(["a0", "a1"], RequestStatus.FINISHED_ABORTED)
    for role, prompt in enumerate((200, 210)):
        played.add(f"b{role}", prompt, recipe=Recipe("b", role, 2), first=100 + role)
    first = played.step()
    assert first == {"b0": 200 - 192, "b1": 210 - 192}


def test_aborted_sequences_leave_nothing_behind(played: Played) -> None:
    scheduler = played.scheduler
    for i in range(4):
        played.add(f"s{i}", 5, first=i + 1)
    played.step()
    played.add("a0", 10, recipe=Recipe("a", 0, 2))
    played.group("b", (10, 10))
    played.add("late", 5)
    played.step()
    assert scheduler.get_num_unfinished_requests() == 4 + 4
    scheduler.finish_requests(["a0", "b0", "b1", "late", "unknown"], RequestStatus.FINISHED_ABORTED)
    assert scheduler.get_num_unfinished_requests() == 4
    assert set(played.step()) == {"s0", "s1", "s2", "s3"}
    assert not scheduler.admission.pending
    played.group("c", (10, 10))
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert scheduler.get_num_unfinished_requests() == 0
    played.add("new", 5)
    assert played.step()["new"] == 5
    assert not scheduler.admission.pending


def test_priority_goes_before_arrival_for_groups_too(played: Played) -> None:
    for i in range(3):
        played.add(f"s{i}", 5, first=i + 1, max_tokens=4)
    played.step()
    played.group("low", (10, 10), priority=5)
    played.add("single", 5, first=9, priority=1, max_tokens=20)
    played.group("high", (10, 10), priority=-1)
    assert set(played.step()) == {"s0", "s1", "s2"}, "the first in order needs two places"
    for _ in range(3):
        step = played.step()
    assert {"high0", "high1", "single"} <= set(step), "the fourth place goes to the next in order"
    assert "low0" not in step
    while "low0" not in step:
        step = played.step()
    assert "low1" in step


def test_a_group_that_comes_later_holds_up_nothing_before_it(played: Played) -> None:
    for i in range(3):
        played.add(f"s{i}", 5, first=i + 1)
    played.step()
    played.group("a", (10, 10), priority=1)
    played.add("sooner", 5, first=8)
    assert "sooner" in played.step()


def test_a_grammar_that_is_being_compiled_holds_up_its_group_alone(model_path: str) -> None:
    from concurrent.futures import Future

    played = Played(model_path)
    grammar: Future[Any] = Future()
    for role in range(2):
        schema = {"structured_outputs": StructuredOutputsParams(json={"type": "object"})} if role == 0 else {}
        sampling = SamplingParams(extra_args=Recipe("a", role, 2).extra_args(), max_tokens=9, ignore_eos=True, **schema)
        request = Request(f"a{role}", [role + 1] * 10, sampling, None, block_hasher=played.hasher)
        if request.structured_output_request is not None:
            request.structured_output_request.grammar = grammar
            assert request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        played.scheduler.add_request(request)
    played.group("b", (10, 10))
    assert set(played.step()) == {"b0", "b1"}
    grammar.set_result(object())
    output = played.scheduler.schedule()
    assert set(output.num_scheduled_tokens) == {"a0", "a1", "b0", "b1"}
