"""The scheduler that lets the rows of a mixture begin together: vLLM's own beneath it, the model runner played."""

from collections import Counter
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from guiderail.server.engines.mixed import Recipe
from guiderail.server.engines.vllm_gang import MANY_ROWS, AsyncGroupScheduler, GroupScheduler
from guiderail.server.engines.vllm_params import ROWS

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
        """One step of the engine: the tokens scheduled of each row."""
        output = self.scheduler.schedule()
        rows = list(output.num_scheduled_tokens)
        sampled = []
        for name in rows:
            request = self.scheduler.requests[name]
            done = not request.is_prefill_chunk
            self.emitted[name] += done
            sampled.append([7] if done else [])
        self.scheduler.update_from_output(
            output, ModelRunnerOutput(rows, {name: i for i, name in enumerate(rows)}, sampled)
        )
        return dict(output.num_scheduled_tokens)

    def in_step(self, name: str, size: int) -> bool:
        return len({self.emitted[f"{name}{role}"] for role in range(size)}) == 1


@pytest.fixture(params=[GroupScheduler, AsyncGroupScheduler], ids=["plain", "async"])
def played(request: pytest.FixtureRequest, model_path: str) -> Played:
    return Played(model_path, request.param)


def test_a_group_waits_for_its_last_row(played: Played) -> None:
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
    assert step == {"long": 244}, "12 tokens are left; one row alone would begin"
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
    """The rows part (which mixed.py sees), and begin together when they come again."""
    played.group("a", (200, 210))
    while not (played.emitted["a0"] and played.emitted["a1"]):
        played.step()
    assert not played.in_step("a", 2)
    played.scheduler.finish_requests(["a0", "a1"], RequestStatus.FINISHED_ABORTED)
    for role, prompt in enumerate((200, 210)):
        played.add(f"b{role}", prompt, recipe=Recipe("b", role, 2), first=100 + role)
    first = played.step()
    assert first == {"b0": 200 - 192, "b1": 210 - 192}


def test_aborted_rows_leave_nothing_behind(played: Played) -> None:
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
    assert not scheduler._groups
    played.group("c", (10, 10))
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert scheduler.get_num_unfinished_requests() == 0
    played.add("new", 5)
    assert played.step()["new"] == 5
    assert not scheduler._groups


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


class TestPromptsInWholeSteps:
    """Without chunked prefill: plain chats begin at once, a step reads PROMPT_TOKENS of others beside what decodes."""

    @pytest.fixture(params=[GroupScheduler, AsyncGroupScheduler], ids=["plain", "async"])
    def whole(self, request: pytest.FixtureRequest, model_path: str) -> Played:
        sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 1024, "enable_chunked_prefill": False}
        return Played(model_path, request.param, **sizes)

    def wide(self, played: Played, rows: int, prompt: int, priority: int = 0) -> None:
        for row in range(rows):
            played.add(f"w{row}", prompt, first=50 + row, priority=priority * ROWS + 1 + row)

    def test_a_wide_request_alone_begins_at_once(self, whole: Played) -> None:
        self.wide(whole, 8, 30)
        assert whole.step() == {f"w{row}": 30 for row in range(8)}

    def test_beside_others_it_begins_over_several_steps(self, whole: Played) -> None:
        whole.add("chat", 20)
        whole.step()
        self.wide(whole, 6, 30)
        assert whole.step() == {"chat": 1, "w0": 30, "w1": 30}
        assert whole.step() == {"chat": 1, "w0": 1, "w1": 1, "w2": 30, "w3": 30}
        assert whole.step()["w5"] == 30

    def test_chats_that_come_together_begin_together_and_before_wide_requests(self, whole: Played) -> None:
        whole.add("chat", 20)
        whole.step()
        self.wide(whole, 4, 40)
        for i in range(5):
            whole.add(f"c{i}", 100, first=i + 2)
        step = whole.step()
        assert step.keys() == {"chat", "w0", *(f"c{i}" for i in range(5))}
        assert whole.step().keys() - step.keys() == {"w1"}

    def test_a_chat_does_not_wait_for_other_rows_in_two_steps_on_end(self, whole: Played) -> None:
        whole.add("chat", 20)
        whole.step()
        self.wide(whole, 6, 30)
        assert whole.step().keys() == {"chat", "w0", "w1"}
        whole.add("c0", 100, first=2)
        assert whole.step().keys() == {"chat", "w0", "w1", "c0"}, "the last step read other rows: this one not"
        whole.add("c1", 100, first=3)
        assert whole.step().keys() - {"chat", "w0", "w1", "c0"} == {"c1", "w2", "w3"}, "nor do they starve"

    def decoding(self, played: Played, rows: int, priority: int = 1) -> list[str]:
        """Rows that decode: a wide request's, or with priority 0 plain chats."""
        for i in range(rows):
            played.add(f"d{i}", 4, first=2 + i, priority=priority)
        played.step()
        return [f"d{i}" for i in range(rows)]

    def test_many_rows_sit_out_the_step_in_which_chats_begin_but_not_the_next(self, whole: Played) -> None:
        rows = self.decoding(whole, MANY_ROWS)
        whole.add("c0", 100, first=90)
        whole.add("c1", 50, first=91)
        self.wide(whole, 1, 30)
        assert whole.step() == {"c0": 100, "c1": 50}
        whole.add("c2", 100, first=92)
        assert whole.step() == {**dict.fromkeys([*rows, "c0", "c1"], 1), "c2": 100, "w0": 30}
        whole.add("c3", 100, first=93)
        assert whole.step() == {"c0": 1, "c1": 1, "c2": 1, "c3": 100}, "chats that decode go on"
        for _ in range(3):
            whole.step()
        assert {whole.emitted[row] for row in rows} == {5}, "one for each step but two"

    def test_plain_chats_do_not_sit_out_for_each_other(self, whole: Played) -> None:
        rows = self.decoding(whole, MANY_ROWS + 4, priority=0)
        whole.add("c0", 100, first=90)
        assert whole.step() == {**dict.fromkeys(rows, 1), "c0": 100}

    def test_few_rows_do_not_sit_out_nor_do_any_without_a_place_for_the_chat(self, whole: Played) -> None:
        self.decoding(whole, MANY_ROWS - 1)
        whole.add("c0", 100, first=90)
        assert len(whole.step()) == MANY_ROWS
        for i in range(64 - MANY_ROWS):
            whole.add(f"f{i}", 4, first=91)
        whole.step()
        whole.step()
        whole.add("late", 4, first=92)
        assert len(whole.step()) == 64

    def test_rows_do_not_sit_out_where_chats_that_decode_might_lack_a_block(self, model_path: str) -> None:
        sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 1024, "enable_chunked_prefill": False}
        played = Played(model_path, blocks=2 * MANY_ROWS + 3, **sizes)  # one is vLLM's own
        chats = [f"c{i}" for i in range(MANY_ROWS)]
        for i, chat in enumerate(chats):
            played.add(chat, BLOCK - 3, first=60 + i)
        played.step()
        rows = self.decoding(played, MANY_ROWS)
        played.add("late", 20, first=99)
        assert played.step() == {**dict.fromkeys([*chats, *rows], 1), "late": 20}

    def test_rows_of_a_mixture_do_not_sit_out(self, whole: Played) -> None:
        whole.group("a", (10, 10))
        rows = self.decoding(whole, MANY_ROWS)
        whole.add("c0", 100, first=90)
        assert whole.step().keys() == {"a0", "a1", "c0", *rows}
        assert whole.in_step("a", 2)

    def test_rows_that_share_a_prompt_count_what_is_not_cached(self, whole: Played) -> None:
        whole.add("chat", 20)
        whole.step()
        for row in range(8):
            whole.add(f"r{row}", 2 * BLOCK + 20, first=9, priority=row)
        assert whole.step() == {"chat": 1, "r0": 2 * BLOCK + 20, **{f"r{row}": 20 for row in range(1, 4)}}

    def test_a_longer_prompt_is_read_whole_in_its_turn(self, whole: Played) -> None:
        whole.add("chat", 20)
        whole.step()
        self.wide(whole, 3, 900)
        assert whole.step() == {"chat": 1, "w0": 900}, "what waits behind does not overtake"
        assert whole.step() == {"chat": 1, "w0": 1, "w1": 900}

    def test_a_group_begins_in_one_step_all_the_same(self, whole: Played) -> None:
        whole.add("chat", 20)
        whole.step()
        whole.group("a", (200, 200, 200))
        assert whole.step() == {"chat": 1, "a0": 200, "a1": 200, "a2": 200}
