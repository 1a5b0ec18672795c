"""Why the processes of an engine ended: what they wrote to stderr at last, and the signal or status they ended with.

Their stderr is a pipe to this process, which passes everything on at once and remembers the end of it. That also keeps
what no Python code in them could tell any more: an abort inside a library, a processor without an instruction.
"""

import asyncio
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
RECENT_S = 10.0  # an error that was written longer before the end is not taken for its cause
PATIENCE_S = 3.0  # for the end of processes that are known to be dying, and of what they wrote
HINTS = {
    signal.SIGKILL: "out of memory?",
    signal.SIGILL: "an instruction that this processor does not have",
    signal.SIGBUS: "is shared memory full?",
}
PREFIX = re.compile(r"^(?:\(\w+[^)]*\) )?(?:(?:ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] )?")  # vLLM's, of each line
EXCEPTION = re.compile(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failure)(?:: .*)?$")
ABORT = re.compile(r"^\s*(?:what\(\): +|(?=Fatal Python error|LLVM ERROR|.*Assertion .* failed))(.+)$")

_one_at_a_time = threading.Lock()  # stderr is the process's: two engines that start together would mix theirs up


class ProcessMonitor:
    """Hears what the processes that are started within `listen` write to stderr, and sees how they end."""

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []
        self._lines: deque[tuple[float, str]] = deque(maxlen=REMEMBERED_LINES)
        self._silent = threading.Event()
        self._ended_at = 0.0
        self._telling: asyncio.Task[str] | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Processes that this one starts within the block write their stderr through us."""
        with _one_at_a_time:
            # This helper of Python's outlives every engine; started within the block it would hold the pipe open.
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

    def cause(self) -> str:
        """In one line, why the processes ended. Waits for their end for PATIENCE_S: not for the event loop."""
        until = time.monotonic() + PATIENCE_S
        self._silent.wait(PATIENCE_S)
        while not (status := next((p.exitcode for p in self.processes if p.exitcode), 0)) and time.monotonic() < until:
            time.sleep(0.02)  # its pipe is closed a little before a process is over
        ended_at = self._ended_at or time.monotonic()
        return describe_end(status, [line for at, line in list(self._lines) if at >= ended_at - RECENT_S])

    async def tell(self) -> str:
        """As `cause`, for the event loop; however many ask, it is found out once."""
        if self._telling is None:
            self._telling = asyncio.create_task(asyncio.to_thread(self.cause))
        return await asyncio.shield(self._telling)

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
        self._silent.set()


def describe_end(status: int, lines: Sequence[str]) -> str:
    """One line from a process's exit status (a signal is negative, 0 unknown) and what it last wrote."""
    texts = [PREFIX.sub("", line) for line in lines]
    errors = [text.strip() for text in texts if EXCEPTION.match(text)]
    aborts = [found[1].strip() for text in texts if (found := ABORT.match(text))]
    if status < 0:
        number = signal.Signals(-status)
        hint = f" ({HINTS[number]})" if number in HINTS else ""
        # Who is killed from outside has said nothing of it.
        said = [] if number in (signal.SIGKILL, signal.SIGTERM) else (aborts or errors)[-1:]
        return ": ".join([f"killed by {number.name}{hint}", *said])
    told = errors or aborts or [text.strip() for text in texts]
    if told:
        return told[-1]
    return f"it ended with status {status} and said nothing" if status else "it ended and said nothing"
