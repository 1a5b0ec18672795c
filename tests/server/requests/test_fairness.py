"""Nobody starves: clients take turns, none takes the last rows or the whole queue, and the operator may limit each."""

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guiderail.server.metrics import Metrics
from guiderail.server.openai_errors import ApiError
from guiderail.server.requests.admission import Admission
from guiderail.server.requests.clients import Client, at_address
from guiderail.server.requests.turns import Turns
from guiderail.server.settings import OperatorLimits

GREEDY, PLAIN, THIRD = (Client("key", name) for name in ("greedy", "plain", "third"))


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


class Door:
    """Requests in order of admission, each of which holds its rows until it is let go."""

    def __init__(self, rows: int, **limits: Any) -> None:
        self.admission = Admission(OperatorLimits(**limits), rows, Metrics("fake"))
        self.order: list[Client] = []
        self.running: list[tuple[Client, asyncio.Event]] = []
        self.tasks: list[tuple[Client, asyncio.Task[None]]] = []

    async def ask(self, client: Client, count: int = 1, *, tokens: int = 1000, **more: Any) -> None:
        async def work(rows: int = 1, **more: Any) -> None:
            async with self.admission.slot(rows, tokens, client=client, **more):
                self.order.append(client)
                self.running.append((client, end := asyncio.Event()))
                await end.wait()

        self.tasks += [(client, asyncio.create_task(work(**more))) for _ in range(count)]
        await settle()

    async def end_one(self) -> None:
        self.running.pop(0)[1].set()
        await settle()

    async def close(self) -> None:
        for _, task in self.tasks:
            task.cancel()
        await asyncio.gather(*(task for _, task in self.tasks), return_exceptions=True)
        assert self.admission.waiting == 0
        assert not self.admission._requests, "nothing is left of clients that are gone"
        assert not self.admission._narrow_rows

    def refused(self, client: Client) -> list[ApiError]:
        done = [task.exception() for who, task in self.tasks if who == client and task.done()]
        return [error for error in done if isinstance(error, ApiError)]


async def test_two_hundred_long_chats_keep_no_other_client_out() -> None:
    door = Door(128)
    await door.ask(GREEDY, 200)
    assert Counter(door.order) == {GREEDY: 122}, "the last rows are for others"
    await door.ask(PLAIN, tokens=20)
    assert door.order[-1] == PLAIN, "at once, though 78 wait"
    await door.close()


async def test_without_rows_kept_a_newcomer_is_next() -> None:
    door = Door(4, newcomer_share=0)
    await door.ask(GREEDY, 20)
    await door.ask(PLAIN)
    assert Counter(door.order) == {GREEDY: 4}
    await door.end_one()
    assert door.order[-1] == PLAIN
    await door.close()


async def test_clients_that_wait_take_turns_by_what_they_ask_for() -> None:
    door = Door(1)
    await door.ask(THIRD)
    await door.ask(GREEDY, 12, tokens=100)
    await door.ask(PLAIN, 6, tokens=200)
    for _ in range(12):
        await door.end_one()
    assert Counter(door.order[1:10]) == {GREEDY: 6, PLAIN: 3}, "equal tokens, so twice as many of the short ones"
    await door.close()


async def test_wide_requests_take_turns_too() -> None:
    door = Door(8)
    await door.ask(GREEDY, 5, rows=6)
    await door.ask(PLAIN, rows=6)
    await door.end_one()
    assert door.order == [GREEDY, PLAIN]
    await door.close()


@pytest.mark.parametrize("limits", [{"max_queue": 10}, {"max_queue_tokens": 10_000}])
async def test_a_full_queue_has_room_for_a_client_that_waits_with_less(limits: dict[str, int]) -> None:
    door = Door(2, **limits)
    await door.ask(GREEDY, 20)
    at_once = door.refused(GREEDY)
    assert len(at_once) == 8
    assert door.admission.waiting == 10
    await door.ask(PLAIN)
    await door.ask(THIRD, 2)
    assert not door.refused(PLAIN)
    assert not door.refused(THIRD)
    assert door.admission.waiting == 10
    pushed_out = [error for error in door.refused(GREEDY) if error not in at_once]
    assert len(pushed_out) == 3
    assert all(error.status == 429 and error.retry_after_s for error in pushed_out)
    assert "API key 'greedy' waits with more than others" in str(pushed_out[0])
    await door.ask(PLAIN, 20)
    assert door.refused(PLAIN), "nobody makes room for one that waits with as much"
    await door.close()


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_client_requests": 3}, "API key 'greedy' has 3 requests in flight; one client may have 3"),
        ({"max_client_tokens": 3500}, "API key 'greedy' has requests of 3000 tokens in flight"),
    ],
)
async def test_a_limit_of_each_client_says_whose_it_is(limits: dict[str, int], said: str) -> None:
    door = Door(2, **limits)
    await door.ask(GREEDY, 4)
    (refusal,) = door.refused(GREEDY)
    assert said in str(refusal)
    assert (refusal.status, refusal.retry_after_s) == (429, 1)
    assert refusal.body["error"]["code"] == "client_limit"
    assert refusal.body["error"]["type"] == "rate_limit_error"
    await door.ask(PLAIN, 3)
    assert not door.refused(PLAIN)
    await door.end_one()
    await door.ask(GREEDY)
    assert len(door.refused(GREEDY)) == 1, "what has ended does not count"
    await door.close()


async def test_a_request_larger_than_a_clients_tokens_runs_alone() -> None:
    door = Door(2, max_client_tokens=500)
    await door.ask(GREEDY)
    assert door.order == [GREEDY]
    await door.close()


async def test_giving_up_costs_no_turn() -> None:
    door = Door(1)
    await door.ask(THIRD)
    await door.ask(PLAIN, 5)
    for _, task in door.tasks[1:]:
        task.cancel()
    await settle()
    await door.ask(GREEDY, 3)
    await door.ask(PLAIN)
    await door.end_one()
    await door.end_one()
    assert PLAIN in door.order
    await door.close()


@given(st.lists(st.tuples(st.sampled_from([GREEDY, PLAIN, THIRD]), st.integers(1, 50)), min_size=1, max_size=60))
def test_no_client_is_ever_further_ahead_than_one_piece(work: list[tuple[Client, int]]) -> None:
    """Goyal et al. 1996, theorem 1: while two clients wait, what they got differs by less than a largest piece of each."""
    turns = Turns()
    places = sorted((turns.place(client, cost), number) for number, (client, cost) in enumerate(work))
    left, got = Counter(client for client, _ in work), Counter[Client]()
    largest = {client: max(cost for who, cost in work if who == client) for client in left}
    for place, number in places:
        turns.begin(place)
        client, cost = work[number]
        left[client] -= 1
        got[client] += cost
        waiting = [each for each in left if left[each]]
        for one in waiting:
            for other in waiting:
                assert got[one] - got[other] <= largest[one] + largest[other]


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
    ],
)
def test_an_address_is_a_client_and_a_network_of_ipv6_one(host: str, name: str) -> None:
    assert at_address(host) == Client("address", name)
    assert at_address(host).label == "", "there is no end to addresses, and metrics have one label for each client"
