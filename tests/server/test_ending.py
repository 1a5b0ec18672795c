"""The end of a process by signals, whatever keeps it: in processes of their own, which do what a server may do."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

PRELUDE = """
import asyncio, os, subprocess, sys, time
from guiderail.server.ending import Ending
async def stopped(within_s, work, orderly=True):
    stop = asyncio.Event()
    with Ending(stop, within_s) as ending:
        ending.orderly = orderly
        await work()
        print("ready", flush=True)
        await stop.wait()
        print("stop", flush=True)
async def nothing(): pass
"""
LONG_S = 1000


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said "ready"."""
    command = [sys.executable, "-P", "-c", PRELUDE + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as run:
        assert run.stdout is not None
        try:
            line = run.stdout.readline()
            assert line == "ready\n", run.communicate()[1]
            yield run
        finally:
            run.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_in_order(number: int) -> None:
    with process(f"asyncio.run(stopped({LONG_S}, nothing))") as run:
        run.send_signal(number)
        assert run.communicate(timeout=60) == ("stop\n", "")
        assert run.returncode == 0


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("kept", "thread"),
    [
        ("asyncio.get_running_loop().run_in_executor(None, time.sleep, 1000)", "_0"),
        ("import threading; threading.Thread(target=time.sleep, args=(1000,), name='mine').start()", "mine"),
    ],
)
def test_a_thread_that_computes_for_ever_does_not_keep_it(loop: str, kept: str, thread: str) -> None:
    code = f"async def work():\n    {kept}\nimport {loop}\n{loop}.run(stopped(0.5, work))"
    with process(code) as run:
        run.send_signal(signal.SIGTERM)
        out, said = run.communicate(timeout=60)
        assert out == "stop\n"
        assert said.startswith("guiderail: stopped, though something still ran (threads: ")
        assert thread in said
        assert said.count("\n") == 1
        assert run.returncode == 0


def test_a_loop_that_is_blocked_does_not_keep_it() -> None:
    code = "async def work():\n    print('ready', flush=True)\n    while True: pass\nimport uvloop\nuvloop.run(stopped(0.5, work))"
    with process(code) as run:
        run.send_signal(signal.SIGTERM)
        assert "something still ran" in run.communicate(timeout=60)[1]
        assert run.returncode == 0


SLEEPERS = """
sleep = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(1000)"]
def sleeper():
    child = subprocess.Popen(sleep, stdout=subprocess.PIPE)
    child.stdout.readline()
    return child
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("orderly", "signals", "words"), [(False, 1, "stopped while starting"), (True, 2, "stopped at once")]
)
def test_a_second_signal_or_one_during_the_start_ends_it_with_its_processes(
    loop: str, orderly: bool, signals: int, words: str
) -> None:
    code = f"""{SLEEPERS}
before = sleeper()
async def work():
    child = sleeper()
    print("ready", flush=True)
    print(before.pid, child.pid, flush=True)
    if {orderly}:
        asyncio.create_task(stays())
async def stays():
    while True:
        try: await asyncio.sleep(1000)
        except asyncio.CancelledError: pass
async def main():
    stop = asyncio.Event()
    with Ending(stop, {LONG_S}) as ending:
        ending.orderly = {orderly}
        await work()
        await stop.wait()
        print("stop", flush=True)
        await asyncio.sleep(1000)
import {loop}
{loop}.run(main())
"""
    with process(code) as run:
        assert run.stdout is not None
        before, child = (psutil.Process(int(pid)) for pid in run.stdout.readline().split())
        try:
            run.send_signal(signal.SIGTERM)
            if signals == 2:
                assert run.stdout.readline() == "stop\n"
                run.send_signal(signal.SIGINT)
            assert run.wait(60) == 130
            assert run.stderr is not None
            assert run.stderr.readline() == f"guiderail: {words}\n"
            assert psutil.wait_procs([child], timeout=60)[1] == []
            assert before.is_running()
        finally:
            before.kill()
