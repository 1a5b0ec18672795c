"""The processes that work on what clients wrote: limits, turns, restarts, and their end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import psutil
import pytest

from guiderail.server.bounded import bounded as module
from guiderail.server.bounded.bounded import Bounded, Refused

SLOW = ("match_pattern", "(a|aa)+$", "search", False, ["a" * 60 + "b"])


@pytest.fixture
def processes() -> Iterator[Bounded]:
    made = Bounded()
    yield made
    made.stop()


def quick(text: str) -> tuple[Any, ...]:
    return "match_pattern", "^a", "search", False, [text]


def test_a_job_that_takes_too_long_fails_and_the_next_one_runs(processes: Bounded) -> None:
    first, slow, last = (processes.submit(*job) for job in (quick("a"), SLOW, quick("b")))
    assert first.result() == [1.0]
    with pytest.raises(Refused, match="takes more than 1 s of processor time"):
        slow.result()
    assert last.result() == [0.0]
    assert len(family(processes)) == 2, "the process and the child that works"


def family(processes: Bounded) -> list[psutil.Process]:
    """The processes that do jobs, and their children that do the work."""
    made = [worker._process for worker in processes._workers if worker._process is not None]
    alive = [psutil.Process(each.pid) for each in made if each.poll() is None]
    return alive + [child for each in alive for child in each.children()]


def test_owners_take_turns(processes: Bounded) -> None:
    """Ten jobs of one owner do not come before the first of another."""
    order: list[str] = []

    def done(name: str) -> Any:
        return lambda future: order.append(name)

    held = processes.submit(*SLOW, owner="held")  # all others are queued meanwhile
    many = [processes.submit(*quick("a"), owner="many") for _ in range(10)]
    one = processes.submit(*quick("a"), owner="one")
    for name, jobs in (("many", many), ("one", [one])):
        for job in jobs:
            job.add_done_callback(done(name))
    wait([held, one, *many])
    assert order.index("one") <= 1
    assert order.count("many") == 10


def test_an_owner_whose_jobs_add_up_to_too_much_loses_the_rest(
    processes: Bounded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OWNER_CPU_S", 1.5)
    jobs: list[Future[Any]] = [processes.submit(*SLOW, owner="slow") for _ in range(6)]
    errors = [str(job.exception()) for job in jobs]
    assert errors[:2] == ["takes more than 1 s of processor time"] * 2
    assert set(errors[2:]) == {"takes more than 1.5 s of processor time in all"}
    assert processes.submit(*quick("a"), owner="slow").result() == [1.0]


def test_a_cancelled_job_is_not_begun(processes: Bounded) -> None:
    held = processes.submit(*SLOW)
    waiting = [processes.submit(*SLOW) for _ in range(50)]
    assert all(job.cancel() for job in waiting)
    after = processes.submit(*quick("a"))
    began = time.process_time()
    assert after.result() == [1.0]
    assert held.done()
    assert time.process_time() - began < 50


def test_memory_has_a_limit(processes: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The regex module keeps every capture of a group."""
    monkeypatch.setattr(module, "JOB_CPU_S", 600.0)
    with pytest.raises(Refused, match="too much memory"):
        processes.submit("match_pattern", "((a)(b))*", "search", False, ["ab" * 20_000_000]).result()
    assert processes.submit(*quick("a")).result() == [1.0]


def test_a_process_that_is_killed_is_replaced(processes: Bounded) -> None:
    assert processes.submit(*quick("a")).result() == [1.0]
    killed = family(processes)
    for process in killed:
        process.kill()
    psutil.wait_procs(killed, timeout=30)
    results = []
    for _ in range(2):  # the first may find out
        try:
            results.append(processes.submit(*quick("a")).result())
        except RuntimeError as error:
            results.append(str(error))
    assert results[-1] == [1.0]


def test_stopping_ends_what_runs_and_what_waits(processes: Bounded) -> None:
    running, waiting = processes.submit(*SLOW), processes.submit(*SLOW)
    while not running.running():
        time.sleep(0.01)
    processes.stop()
    with pytest.raises((RuntimeError, Refused)):
        running.result()
    with pytest.raises(CancelledError):
        waiting.result()
    assert family(processes) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_is_left_when_the_server_is_gone(number: signal.Signals) -> None:
    code = (
        "from guiderail.server.bounded.bounded import bounded; import os, sys, time\n"
        f"held = [bounded().submit(*{SLOW!r}) for _ in range(100)]\n"
        "held[0].exception(); print('one is done', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline()
        left = psutil.Process(server.pid).children(recursive=True)
        assert left
        os.kill(server.pid, number)
    _, alive = psutil.wait_procs(left, timeout=60)
    assert alive == []


async def test_a_verdict_is_kept(processes: Bounded) -> None:
    for _ in range(3):
        await processes.vet("check_pattern", "a+")
        with pytest.raises(Refused, match="not a regular expression"):
            await processes.vet("check_pattern", "(")
    for process in family(processes):
        process.kill()
    await processes.vet("check_pattern", "a+")  # nobody is asked


def test_its_imports_are_few() -> None:
    """The process has none of what makes the server large."""
    code = (
        "import sys; from guiderail.server.bounded import jobs, work_process; jobs.preload()\n"
        "print([m for m in ('torch', 'vllm', 'numpy', 'transformers', 'pydantic', 'fastapi') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
