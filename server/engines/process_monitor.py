"""Processes of an engine: why they died, and their end with the server that started them.

The cause of death is told from the end of their stderr and the signal or status that they ended with. Their stderr is a
pipe to this process, which passes everything on at once and remembers the end of it. So even what no Python code in
them could report is kept: an abort inside a library, an instruction that the processor lacks.
"""

import asyncio
import functools
import multiprocessing
import multiprocessing.resource_tracker
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess

REMEMBERED_LINES = 400
RECENT_S = 10.0  # an error written longer before the end is not taken for its cause
PATIENCE_S = 3.0  # to wait for processes that are known to be dying, and for the end of their stderr
HINTS = {
    signal.SIGKILL: "out of memory?",
    signal.SIGILL: "an instruction that this processor does not have",
    signal.SIGBUS: "is shared memory full?",
}
PREFIX = re.compile(r"^(?:\(\w+[^)]*\) )?(?:(?:ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] )?")  # vLLM's, on every line
EXCEPTION = re.compile(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failure)(?:: .*)?$")
ABORT = re.compile(r"^\s*(?:what\(\): +|(?=Fatal Python error|LLVM ERROR|.*Assertion .* failed))(.+)$")

_one_at_a_time = threading.Lock()  # file descriptor 2 is shared: engines that start together would mix up theirs


class ProcessMonitor:
    """Keeps the end of stderr, and the exit status, of processes that are started within `watch`."""

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []
        self._lines: deque[tuple[float, str]] = deque(maxlen=REMEMBERED_LINES)
        self._closed = threading.Event()  # their stderr, by all of them
        self._ended_at = 0.0
        self._finding: asyncio.Task[str] | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Pass on the stderr of processes that this one starts within the block."""
        with _one_at_a_time:
            # This helper process of Python outlives every engine; started within the block it would hold the pipe open.
            multiprocessing.resource_tracker.ensure_running()
            source, sink = os.pipe()
            ours, copy = os.dup(2), os.dup(2)
            os.dup2(sink, 2)
            os.close(sink)
            threading.Thread(target=self._pass_on, args=(source, copy), name="guiderail-stderr", daemon=True).start()
            plain = BaseProcess.start

            def start(process: BaseProcess) -> None:
                self.processes.append(process)
                plain(process)

            BaseProcess.start = start  # type: ignore[method-assign,assignment]  # vLLM hands out none that failed to start
            try:
                yield
            finally:
                BaseProcess.start = plain  # type: ignore[method-assign]
                os.dup2(ours, 2)
                os.close(ours)

    def wait_for_cause(self) -> str:
        """Return why the processes ended, in one line. Blocks up to PATIENCE_S for their end: not on the event loop."""
        until = time.monotonic() + PATIENCE_S
        self._closed.wait(PATIENCE_S)
        while not (status := next((p.exitcode for p in self.processes if p.exitcode), 0)) and time.monotonic() < until:
            time.sleep(0.02)  # its pipe is closed a little before a process is over
        ended_at = self._ended_at or time.monotonic()
        return describe_end(status, [line for at, line in list(self._lines) if at >= ended_at - RECENT_S])

    async def cause(self) -> str:
        """Return why the processes ended, for the event loop; found out once for all who ask."""
        if self._finding is None:
            self._finding = asyncio.create_task(asyncio.to_thread(self.wait_for_cause))
        return await asyncio.shield(self._finding)

    def _pass_on(self, source: int, copy: int) -> None:
        rest = b""
        while chunk := os.read(source, 1 << 16):
            with suppress(OSError):  # nobody reads our stderr any more
                os.write(copy, chunk)
            *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
            now = time.monotonic()
            self._lines.extend((now, line.decode(errors="replace")) for line in lines if line.strip())
        self._ended_at = time.monotonic()
        if rest.strip():
            self._lines.append((self._ended_at, rest.decode(errors="replace")))
        os.close(source)
        os.close(copy)
        self._closed.set()


def describe_end(status: int, lines: Sequence[str]) -> str:
    """Describe a process's end in one line from its exit status (negative: a signal, 0: unknown) and last output."""
    texts = [PREFIX.sub("", line) for line in lines]
    errors = [text.strip() for text in texts if EXCEPTION.match(text)]
    aborts = [found[1].strip() for text in texts if (found := ABORT.match(text))]
    if status < 0:
        number = signal.Signals(-status)
        hint = f" ({HINTS[number]})" if number in HINTS else ""
        # A process killed from outside has written nothing about it.
        said = [] if number in (signal.SIGKILL, signal.SIGTERM) else (aborts or errors)[-1:]
        return ": ".join([f"killed by {number.name}{hint}", *said])
    told = errors or aborts or [text.strip() for text in texts]
    if told:
        return told[-1]
    return f"it ended with status {status} and said nothing" if status else "it ended and said nothing"


@functools.cache
def end_with_parent() -> None:
    """Exit at once when the process that started this one by `multiprocessing` is gone.

    The server ends vLLM's processes. A server that was killed (out of memory, `kill -9`) cannot; they would wait for it
    forever, hold the memory that its successor needs, and ignore SIGTERM.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="guiderail-parent", daemon=True).start()
