"""The cause that is told of an engine whose processes died: with real processes, which end in every way there is."""

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable

import pytest

from guiderail.server.engines.process_monitor import ProcessMonitor, describe_end


def run(monitor: ProcessMonitor, end: Callable[[], None]) -> None:
    """Start a process that `monitor` watches, and wait for its end."""

    def child() -> None:
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # pytest's writes elsewhere
        end()

    with monitor.watch():
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
    process.join()


def raising() -> None:
    logging.getLogger().warning("a warning before")
    try:
        {}["nothing"]
    except KeyError as error:
        raise RuntimeError("sour milk") from error


def logging_like_vllm() -> None:
    print("(EngineCore pid=7) ERROR 11-30 03:00:00 [core.py:1512] Traceback (most recent call last):", file=sys.stderr)
    print(
        "(EngineCore pid=7) ERROR 11-30 03:00:00 [core.py:1512] safetensors_rust.SafetensorError: bad header",
        file=sys.stderr,
    )
    print("WARNING something about the end", file=sys.stderr, flush=True)
    os._exit(1)


def aborting() -> None:
    os.write(
        2, b"terminate called after throwing an instance of 'dnnl::error'\n  what():  could not create a primitive\n"
    )
    os.abort()


def killed_by(number: int) -> None:
    print("ValueError: of a request, long answered", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)
    time.sleep(60)


def illegal() -> None:
    killed_by(signal.SIGILL)


def killed() -> None:
    killed_by(signal.SIGKILL)


def leaving() -> None:
    os._exit(3)


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (raising, "RuntimeError: sour milk"),
        (logging_like_vllm, "safetensors_rust.SafetensorError: bad header"),
        (aborting, "killed by SIGABRT: could not create a primitive"),
        (illegal, "killed by SIGILL (an instruction that this processor does not have): ValueError: of a request, long answered"),
        (killed, "killed by SIGKILL (out of memory?)"),
        (leaving, "it ended with status 3 and said nothing"),
    ],
)  # fmt: skip
def test_every_end_has_its_cause(end: Callable[[], None], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    monitor = ProcessMonitor()
    run(monitor, end)
    assert monitor.wait_for_cause() == told
    print("and this process's own stderr is what it was", file=sys.stderr)
    seen = capfd.readouterr().err
    assert "this process's own stderr is what it was" in seen
    for said in ("sour milk", "bad header", "a primitive", "long answered"):
        assert (said in seen) == (said in told or (end is killed and said == "long answered")), "passed on as it was"


def test_an_old_error_is_not_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guiderail.server.engines.process_monitor.RECENT_S", -1.0)
    monitor = ProcessMonitor()
    run(monitor, illegal)
    assert monitor.wait_for_cause() == "killed by SIGILL (an instruction that this processor does not have)"


def test_python_says_that_it_crashed() -> None:
    monitor = ProcessMonitor()

    def crash() -> None:
        faulthandler.disable()  # a library that other tests import may have put a handler of its own above pytest's
        faulthandler.enable(2)
        os.kill(os.getpid(), signal.SIGSEGV)

    run(monitor, crash)
    assert monitor.wait_for_cause() == "killed by SIGSEGV: Fatal Python error: Segmentation fault"


def test_nothing_known() -> None:
    assert describe_end(0, []) == "it ended and said nothing"
    assert describe_end(0, ["some line"]) == "some line"
    assert describe_end(1, ["(Worker_TP0 pid=3) ERROR 01-01 00:00:00 [a.py:1] torch.OutOfMemoryError: CUDA out of memory."]) == (
        "torch.OutOfMemoryError: CUDA out of memory."
    )  # fmt: skip
