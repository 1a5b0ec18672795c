"""The process that does the jobs of bounded.py: frames of JSON in at stdin, out at stdout.

    python -m guiderail.server.bounded.work_process

It imports what the jobs need, and forks a child that does them. A job that takes more processor time or memory than it
may is ended by the kernel, and the child with it; the parent says so in the job's place and forks the next child, which
takes a millisecond. If whoever gave the jobs is gone, the child reads the end of stdin, after its job's limit at the
latest, and both end.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import IO

from guiderail.server.bounded.frames import read_frame, write_frame

MEMORY = 1 << 30  # bytes of address space
STACK = 1 << 28  # bytes; deep schemas and answers recurse
RECURSION = 10_000  # Python frames
WALL_TIMES = 20  # a job's limit in time, where its limit in processor time is 1
NICENESS = 5  # the engine and the event loop come first


def main() -> None:
    """Do jobs until the end of stdin."""
    from guiderail.server.bounded import jobs

    jobs.preload()
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + STACK, MEMORY + STACK))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Without buffers: what a child has in one would die with it.
    with open(0, "rb", buffering=0) as stdin, open(1, "wb", buffering=0) as stdout:
        _work(stdin, stdout)


def _work(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Have children do jobs, one after the other's death, until one comes to the end of stdin."""
    while True:
        child = os.fork()
        if not child:
            _in_deep_stack(stdin, stdout)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return
        write_frame(stdout, json.dumps({"killed": os.WTERMSIG(status)}).encode())


def _in_deep_stack(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Do jobs until the end of stdin, in a thread whose stack is large."""
    sys.setrecursionlimit(RECURSION)
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve, args=(stdin, stdout))
    thread.start()
    thread.join()


def _serve(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    from guiderail.server.bounded.jobs import JOBS

    while True:
        try:
            job, limit_s, args = json.loads(read_frame(stdin))
        except EOFError:
            return
        reply: dict[str, object]
        # Their signals end a process that does not catch them, in whatever code it is.
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        signal.setitimer(signal.ITIMER_REAL, WALL_TIMES * limit_s)
        began = time.process_time()
        try:
            reply = {"value": JOBS[job](*args)}
        except ValueError as error:
            reply = {"refused": str(error)}
        except RecursionError:
            reply = {"refused": "nests too deeply"}
        except MemoryError:
            reply = {"refused": "takes too much memory"}
        except Exception as error:
            reply = {"failed": repr(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply["cpu_s"] = time.process_time() - began
        write_frame(stdout, json.dumps(reply).encode())


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
