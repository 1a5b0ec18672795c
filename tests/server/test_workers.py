"""Work off the event loop: small work at once, large work in threads, clients in turn."""

import asyncio
import threading

from waiting import until

from guiderail.server.requests.clients import Client
from guiderail.server.workers import SMALL, Workers

ONE, OTHER = Client("key", "one"), Client("key", "other")


async def test_small_work_is_done_at_once_and_large_work_in_a_thread() -> None:
    workers = Workers()
    here = threading.get_ident()
    assert await workers.run(ONE, 10, threading.get_ident) == here
    assert await workers.run(ONE, SMALL, threading.get_ident) != here


async def test_clients_take_turns() -> None:
    workers, order, gate = Workers(threads=1), [], threading.Event()
    holder = asyncio.create_task(workers.run(ONE, SMALL, lambda: gate.wait(30)))
    many = [asyncio.create_task(workers.run(ONE, SMALL, lambda: order.append(ONE))) for _ in range(20)]
    await asyncio.sleep(0)
    few = [asyncio.create_task(workers.run(OTHER, SMALL, lambda: order.append(OTHER))) for _ in range(2)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(holder, *many, *few)
    assert OTHER in order[:2]
    assert order.index(OTHER, order.index(OTHER) + 1) < 5, "its second one has its turn too"


async def test_cancelled_work_holds_its_thread_until_it_ends() -> None:
    workers, gate, done = Workers(threads=1), threading.Event(), []
    first = asyncio.create_task(workers.run(ONE, SMALL, lambda: gate.wait(30)))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(workers.run(ONE, SMALL, lambda: done.append("waiting")))
    next_one = asyncio.create_task(workers.run(OTHER, SMALL, lambda: done.append("next")))
    await asyncio.sleep(0)
    for each in (first, waiting):
        each.cancel()
    await asyncio.gather(first, waiting, return_exceptions=True)
    await asyncio.sleep(0.05)
    assert not done
    gate.set()
    await next_one
    assert done == ["next"]


async def test_an_error_is_raised_and_frees_the_thread() -> None:
    workers = Workers(threads=1)
    for _ in range(3):
        failed = (await asyncio.gather(workers.run(ONE, SMALL, lambda: 1 // 0), return_exceptions=True))[0]
        assert isinstance(failed, ZeroDivisionError)
    cancelled = asyncio.create_task(workers.run(ONE, SMALL, lambda: 1))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    await until(lambda: workers._free == 1)
