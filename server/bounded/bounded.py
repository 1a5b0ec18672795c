"""Work on what clients wrote, in processes that can be ended: what takes too much time or memory fails its own request.

A pattern or a schema of a few bytes can take for ever to compile or to match, in code that no thread can be stopped in.
Here it runs in a process (work_process.py) whose jobs the kernel ends at their limits. Its jobs are functions of one
module (jobs.py). Each owner of jobs gets one turn after the other, so that nobody waits for all that another asked for.
"""

import asyncio
import atexit
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import IO

from guiderail.server.bounded.frames import read_frame, write_frame

Json = None | bool | int | float | str | Sequence["Json"] | dict[str, "Json"]

JOB_CPU_S = 1.0  # processor time of one job
OWNER_CPU_S = 10.0  # processor time of one owner's jobs while some of them wait
VETTED = 1024  # patterns and schemas whose verdicts are kept
LARGEST_REPLY = 1 << 26  # bytes
_TOO_LONG = f"takes more than {JOB_CPU_S:g} s of processor time"
_TOO_BIG = "takes too much memory, or nests too deeply"
KILLS = {  # by the signal that ended a job
    signal.SIGPROF: _TOO_LONG, signal.SIGALRM: _TOO_LONG, signal.SIGABRT: _TOO_BIG, signal.SIGSEGV: _TOO_BIG,
}  # fmt: skip


class Refused(ValueError):
    """What a client wrote is wrong or takes too much; the text says which, and what is allowed."""


@dataclass(slots=True)
class _Job:
    request: tuple[str, float, tuple[Json, ...]]  # its name, the limit in seconds, and the arguments
    result: Future[Json]


@dataclass(slots=True)
class _Lane:
    """The jobs of one owner that wait, and the processor time that those before them took."""

    jobs: deque[_Job] = field(default_factory=deque)
    used_s: float = 0.0


class Bounded:
    """A few processes that do jobs of many owners. They start when they are needed. Use it from any thread."""

    def __init__(self, processes: int = 1) -> None:
        self._wanted = processes
        self._lanes: dict[str, _Lane] = {}
        self._wake = threading.Condition()
        self._workers: list[_Worker] = []
        self._idle = 0
        self._vetted: dict[bytes, str | None] = {}  # why each was refused, or None; the oldest first

    def submit(self, job: str, *args: Json, owner: str = "") -> Future[Json]:
        """Run the function of this name in jobs.py. The result's exception is Refused if it takes too much, or says so.

        Cancelling the future takes the job out of the queue, unless it runs already.
        """
        result: Future[Json] = Future()
        with self._wake:
            self._lanes.setdefault(owner, _Lane()).jobs.append(_Job((job, JOB_CPU_S, args), result))
            if self._idle:
                self._wake.notify()
            elif len(self._workers) < self._wanted:
                worker = _Worker()
                self._workers.append(worker)
                threading.Thread(target=self._serve, args=(worker,), name="guiderail-bounded", daemon=True).start()
        return result

    async def vet(self, job: str, text: str, owner: str = "") -> None:
        """Run a job that only says whether a pattern or schema will do, unless that is known. Raises Refused."""
        key = hashlib.sha256(f"{job} {text}".encode(errors="surrogatepass")).digest()
        if key not in self._vetted:
            try:
                await asyncio.wrap_future(self.submit(job, text, owner=owner))
                self._vetted[key] = None
            except Refused as refusal:
                self._vetted[key] = str(refusal)
            while len(self._vetted) > VETTED:
                self._vetted.pop(next(iter(self._vetted)))
        if (refused := self._vetted.get(key)) is not None:
            raise Refused(refused)

    def stop(self) -> None:
        """End the processes with what they are doing, and cancel what waits. A later job starts them again."""
        with self._wake:
            for lane in self._lanes.values():
                for job in lane.jobs:
                    job.result.cancel()
            self._lanes.clear()
            for worker in self._workers:
                worker.kill()

    def _serve(self, worker: "_Worker") -> None:
        """Do jobs for ever: the thread of one process."""
        while True:
            owner, job = self._take()
            if not job.result.set_running_or_notify_cancel():
                continue
            used_s = JOB_CPU_S
            try:
                value, used_s = worker.do(json.dumps(job.request).encode())
                job.result.set_result(value)
            except Exception as error:
                job.result.set_exception(error)
            self._charge(owner, used_s)

    def _take(self) -> tuple[str, _Job]:
        """Wait for the next job; owners take turns."""
        with self._wake:
            while True:
                for owner in list(self._lanes):
                    lane = self._lanes.pop(owner)
                    if lane.jobs:
                        self._lanes[owner] = lane  # at the end: the others come first
                        return owner, lane.jobs.popleft()
                self._idle += 1
                self._wake.wait()
                self._idle -= 1

    def _charge(self, owner: str, used_s: float) -> None:
        with self._wake:
            if (lane := self._lanes.get(owner)) is None:
                return
            lane.used_s += used_s
            if lane.used_s <= OWNER_CPU_S:
                return
            for job in lane.jobs:
                if job.result.set_running_or_notify_cancel():
                    job.result.set_exception(Refused(f"takes more than {OWNER_CPU_S:g} s of processor time in all"))
            del self._lanes[owner]


class _Worker:
    """One process, started with its first job and again after its end. Only `kill` is called from another thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def do(self, request: bytes) -> tuple[Json, float]:
        """Return a job's value and the processor time it took. Raises Refused, or RuntimeError if our code fails."""
        stdin, stdout = self._started()
        try:
            write_frame(stdin, request)
            reply = json.loads(read_frame(stdout, LARGEST_REPLY))
        except (OSError, EOFError, ValueError) as error:
            self.kill()
            raise RuntimeError(f"the process for patterns and schemas ended: {error!r}") from error
        match reply:
            case {"value": value, "cpu_s": used_s}:
                return value, used_s
            case {"refused": text}:
                raise Refused(text)
            case {"killed": number} if number in KILLS:
                raise Refused(KILLS[number])
        self.kill()
        raise RuntimeError(f"the process for patterns and schemas failed: {reply}")

    def _started(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._process is None or self._process.poll() is not None:
            # A session of its own: Ctrl-C is for the server, which then ends this.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "guiderail.server.bounded.work_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def kill(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@cache
def bounded() -> Bounded:
    """Return what does the jobs of this process, in one process for each four cores."""
    made = Bounded(max(1, (os.cpu_count() or 1) // 4))
    atexit.register(made.stop)
    return made
