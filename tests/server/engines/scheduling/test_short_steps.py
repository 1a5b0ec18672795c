"""The scheduler without chunked prefill: plain chats begin at once, a step reads PROMPT_TOKENS of others beside what decodes."""

import pytest
from played import BLOCK, Played

from guiderail.server.engines.vllm.params import PRIORITY_STRIDE
from guiderail.server.engines.vllm.scheduling.scheduler import AsyncGroupScheduler, GroupScheduler
from guiderail.server.engines.vllm.scheduling.short_steps import MANY_SEQUENCES


@pytest.fixture(params=[GroupScheduler, AsyncGroupScheduler], ids=["plain", "async"])
def whole(request: pytest.FixtureRequest, model_path: str) -> Played:
    sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 1024, "enable_chunked_prefill": False}
    return Played(model_path, request.param, **sizes)


def wide(played: Played, sequences: int, prompt: int, priority: int = 0) -> None:
    for sequence in range(sequences):
        played.add(f"w{sequence}", prompt, first=50 + sequence, priority=priority * PRIORITY_STRIDE + 1 + sequence)


def test_a_wide_request_alone_begins_at_once(whole: Played) -> None:
    wide(whole, 8, 30)
    assert whole.step() == {f"w{sequence}": 30 for sequence in range(8)}


def test_beside_other_wide_requests_it_begins_at_once(whole: Played) -> None:
    sequences = decoding(whole, 4)
    wide(whole, 8, 30)
    assert whole.step() == {**dict.fromkeys(sequences, 1), **{f"w{sequence}": 30 for sequence in range(8)}}


def test_beside_others_it_begins_over_several_steps(whole: Played) -> None:
    whole.add("chat", 20)
    whole.step()
    wide(whole, 6, 30)
    assert whole.step() == {"chat": 1, "w0": 30, "w1": 30}
    assert whole.step() == {"chat": 1, "w0": 1, "w1": 1, "w2": 30, "w3": 30}
    assert whole.step()["w5"] == 30


def test_chats_that_come_together_begin_together_and_before_wide_requests(whole: Played) -> None:
    whole.add("chat", 20)
    whole.step()
    wide(whole, 4, 40)
    for i in range(5):
        whole.add(f"c{i}", 100, first=i + 2)
    step = whole.step()
    assert step.keys() == {"chat", "w0", *(f"c{i}" for i in range(5))}
    assert whole.step().keys() - step.keys() == {"w1"}


def test_a_chat_does_not_wait_for_other_sequences_in_two_steps_on_end(whole: Played) -> None:
    whole.add("chat", 20)
    whole.step()
    wide(whole, 6, 30)
    assert whole.step().keys() == {"chat", "w0", "w1"}
    whole.add("c0", 100, first=2)
    assert whole.step().keys() == {"chat", "w0", "w1", "c0"}, "the last step read other sequences: this one not"
    whole.add("c1", 100, first=3)
    assert whole.step().keys() - {"chat", "w0", "w1", "c0"} == {"c1", "w2", "w3"}, "nor do they starve"


def decoding(played: Played, sequences: int, priority: int = 1) -> list[str]:
    """Rows that decode: a wide request's, or with priority 0 plain chats."""
    for i in range(sequences):
        played.add(f"d{i}", 4, first=2 + i, priority=priority)
    played.step()
    return [f"d{i}" for i in range(sequences)]


def test_many_sequences_sit_out_the_step_in_which_chats_begin_but_not_the_next(whole: Played) -> None:
    sequences = decoding(whole, MANY_SEQUENCES)
    whole.add("c0", 100, first=90)
    whole.add("c1", 50, first=91)
    wide(whole, 1, 30)
    assert whole.step() == {"c0": 100, "c1": 50}
    whole.add("c2", 100, first=92)
    assert whole.step() == {**dict.fromkeys([*sequences, "c0", "c1"], 1), "c2": 100, "w0": 30}
    whole.add("c3", 100, first=93)
    assert whole.step() == {"c0": 1, "c1": 1, "c2": 1, "c3": 100}, "chats that decode go on"
    for _ in range(3):
        whole.step()
    assert {whole.emitted[sequence] for sequence in sequences} == {5}, "one for each step but two"


def test_plain_chats_do_not_sit_out_for_each_other(whole: Played) -> None:
    sequences = decoding(whole, MANY_SEQUENCES + 4, priority=0)
    whole.add("c0", 100, first=90)
    assert whole.step() == {**dict.fromkeys(sequences, 1), "c0": 100}


def test_few_sequences_do_not_sit_out_nor_do_any_without_a_place_for_the_chat(whole: Played) -> None:
    decoding(whole, MANY_SEQUENCES - 1)
    whole.add("c0", 100, first=90)
    assert len(whole.step()) == MANY_SEQUENCES
    for i in range(64 - MANY_SEQUENCES):
        whole.add(f"f{i}", 4, first=91)
    whole.step()
    whole.step()
    whole.add("late", 4, first=92)
    assert len(whole.step()) == 64


def test_sequences_do_not_sit_out_where_chats_that_decode_might_lack_a_block(model_path: str) -> None:
    sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 1024, "enable_chunked_prefill": False}
    played = Played(model_path, blocks=2 * MANY_SEQUENCES + 3, **sizes)  # one is vLLM's own
    chats = [f"c{i}" for i in range(MANY_SEQUENCES)]
    for i, chat in enumerate(chats):
        played.add(chat, BLOCK - 3, first=60 + i)
    played.step()
    sequences = decoding(played, MANY_SEQUENCES)
    played.add("late", 20, first=99)
    assert played.step() == {**dict.fromkeys([*chats, *sequences], 1), "late": 20}


def test_sequences_of_a_mixture_do_not_sit_out(whole: Played) -> None:
    whole.group("a", (10, 10))
    sequences = decoding(whole, MANY_SEQUENCES)
    whole.add("c0", 100, first=90)
    assert whole.step().keys() == {"a0", "a1", "c0", *sequences}
    assert whole.in_step("a", 2)


def test_sequences_that_share_a_prompt_count_what_is_not_cached(whole: Played) -> None:
    whole.add("chat", 20)
    whole.step()
    for sequence in range(8):
        whole.add(f"r{sequence}", 2 * BLOCK + 20, first=9, priority=sequence)
    assert whole.step() == {"chat": 1, "r0": 2 * BLOCK + 20, **{f"r{sequence}": 20 for sequence in range(1, 4)}}


def test_a_longer_prompt_is_read_whole_in_its_turn(whole: Played) -> None:
    whole.add("chat", 20)
    whole.step()
    wide(whole, 3, 900)
    assert whole.step() == {"chat": 1, "w0": 900}, "what waits behind does not overtake"
    assert whole.step() == {"chat": 1, "w0": 1, "w1": 900}


def test_a_group_begins_in_one_step_all_the_same(whole: Played) -> None:
    whole.add("chat", 20)
    whole.step()
    whole.group("a", (200, 200, 200))
    assert whole.step() == {"chat": 1, "a0": 200, "a1": 200, "a2": 200}
