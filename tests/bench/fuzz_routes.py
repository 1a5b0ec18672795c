"""Fuzz of every route: bodies made from the server's own schemas, and mutations of what has hurt servers before.

    make fuzz                       20,000 requests, a scripted engine in process
    make fuzz ARGS="-n 2000 --real" the same against `guiderail serve` with its engine, which SIGTERM must end afterwards

Every answer must be no 5xx, JSON in OpenAI's shape or a valid stream, and leave nothing running; a seeded answer must
stay what it was. What is found is printed with the smallest request that shows it, to go into nasty_bodies.py; the
exit status is then 1.
"""

import argparse
import asyncio
import random
import signal
import sys
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from fuzz_run import Findings, corpus, fuzz, growth, real, scripted
from serve_process import START_S, Serve

GROWTH = 64 * 2**20  # bytes; allocators keep some of what they had


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=20_000, help="number of requests (20000)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**9), help="repeats a run; printed")
    parser.add_argument("--real", action="store_true", help="against a real server")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    if not args.real:
        from guiderail.server.models import catalogue
        from guiderail.server.models.renderer import ChatRenderer
        from guiderail.server.settings import Settings

        renderer = ChatRenderer(catalogue.resolve(catalogue.DEFAULT_MODEL, Settings().cache))
        return _report(_run(scripted(renderer), args.n, args.seed, in_process=True))
    with TemporaryDirectory() as folder:
        server = Serve(Path(folder) / "log")
        try:
            server.wait(lambda: server.ready() == 200, START_S)
            findings = _run(real(server.url), args.n, args.seed, in_process=False)
            print(f"SIGTERM ends it with status {server.end(signal.SIGTERM, 60)}, and no process is left")
            log = server.log.read_text()
            print(f"{log.count('Traceback')} tracebacks in {log.count(chr(10))} lines of log")
        finally:
            server.kill()
    return _report(findings)


def _run(opening: AbstractAsyncContextManager[Any], count: int, seed: int, *, in_process: bool) -> Findings:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    client, idle = loop.run_until_complete(opening.__aenter__())
    began, memory = time.monotonic(), psutil.Process().memory_info().rss
    shown = 0.0

    def progress(findings: Findings) -> None:
        nonlocal shown
        if time.monotonic() - shown > 10 or findings.count == count:
            shown = time.monotonic()
            grown = (psutil.Process().memory_info().rss - memory) / 2**20
            print(
                f"{findings.count} of {count} in {shown - began:.0f} s, {len(findings.faults)} kinds of faults, "
                f"{grown:+.0f} MiB",
                flush=True,
            )

    try:
        findings = Findings()
        loop.run_until_complete(corpus(client, idle, findings))
        print(f"{findings.count} known requests, {len(findings.faults)} faults", flush=True)
        found = fuzz(loop, client, idle, count, seed, progress)
        if in_process:
            grown = loop.run_until_complete(
                growth(client, idle, found.sample, lambda: psutil.Process().memory_info().rss)
            )
            print(f"the last {len(found.sample)} requests, sent again and again: {grown / 2**20:+.1f} MiB")
            if grown > GROWTH:
                found.add(f"memory grows by {grown / 2**20:.0f} MiB", found.sample[0])
        findings.count += found.count
        findings.faults |= found.faults
        return findings
    finally:
        loop.run_until_complete(opening.__aexit__(None, None, None))
        loop.close()


def _report(findings: Findings) -> int:
    print(f"{findings.count} requests, {len(findings.faults)} kinds of faults")
    for line in findings.lines():
        print(line)
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())
