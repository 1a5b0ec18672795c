"""What one hostile client costs the others: `make bench-hostile`.

One server, `guiderail serve` with its defaults but for the context, and for each case of tests/support/hostile_bodies.py
a request (or hundreds of connections) beside two clients: one asks for /health 20 times a second, one has a short plain
chat after another. Measured while the hostile request runs, or for WATCH_S seconds if it takes longer, when its client
hangs up. Both are held against the same two clients alone, in the same run. After each case the server must come to
rest and give a seeded answer as before, and at the end SIGTERM must end it with no process left.

Writes benchmarks/hostile.json and its part of BENCHMARKS.md after each case; --only measures some cases anew.
"""

import argparse
import asyncio
import json
import re
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from fuzz_check import seeded
from fuzz_run import real
from hostile_bodies import BODIES, CONNECTIONS, drip
from measured import verdict
from report import RESULTS, Target, machine, write_section
from serve_process import START_S, Serve

HEALTH_MS, SLOWER = 250.0, 2.0
LEAST_S, WATCH_S, IDLE_S = 5.0, 30.0, 15.0
END_S = 60.0  # for the end of the server: its drain time and the engine's
CASES = (*BODIES, *CONNECTIONS)
CHAT = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@dataclass
class Watched:
    """Latencies of the two clients in a stretch of time, and how the hostile request ended."""

    health_ms: list[float] = field(default_factory=list)
    chat_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    ended: str = ""
    rest_s: float = 0.0


async def watch(client: httpx.AsyncClient, work: Callable[[], Awaitable[str]] | None) -> Watched:
    """Have both clients ask for as long as the work takes, within bounds; each has an answer at least."""
    found, over = Watched(), asyncio.Event()

    async def health() -> None:
        while not over.is_set() or not found.health_ms:
            began = time.perf_counter()
            (await client.get("/health")).raise_for_status()
            found.health_ms.append(1000 * (time.perf_counter() - began))
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), 0.05)

    async def chats() -> None:
        while not over.is_set() or not found.chat_ms:
            began = time.perf_counter()
            (await client.post("/v1/chat/completions", json=CHAT)).raise_for_status()
            found.chat_ms.append(1000 * (time.perf_counter() - began))

    async with asyncio.TaskGroup() as group:
        group.create_task(health())
        group.create_task(chats())
        began = time.perf_counter()
        if work is None:
            await asyncio.sleep(IDLE_S)
        else:
            task = asyncio.create_task(work())
            await asyncio.wait({task}, timeout=WATCH_S)
            task.cancel()
            with suppress(asyncio.CancelledError):
                found.ended = await task
            found.seconds = time.perf_counter() - began
            await asyncio.sleep(max(0.0, LEAST_S - found.seconds))
        over.set()
    found.ended = found.ended or "hung up"
    return found


async def send(url: httpx.URL, data: bytes) -> str:
    """Send a request on a connection of its own; its status. Cancelled, it hangs up."""
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        with suppress(ConnectionError):  # a server may answer and close before it has read all
            writer.write(data)
            await writer.drain()
        line = await reader.readline()
        return line.split()[1].decode() if line else "closed"
    except ConnectionError:
        return "closed"
    finally:
        writer.transport.abort()


async def connections(url: httpx.URL, count: int, first: bytes, rest: bytes) -> str:
    """Open connections that take their time, until all are ended by the server; how many were."""
    ended = 0

    async def one() -> None:
        nonlocal ended
        reader, writer = await asyncio.open_connection(url.host, url.port)
        try:
            writer.write(first)
            for byte in drip(rest) if rest else (b"" for _ in range(600)):
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(), 1)
                    break
                writer.write(byte)
            ended += 1
        except ConnectionError:
            ended += 1
        finally:
            writer.transport.abort()

    try:
        await asyncio.gather(*(one() for _ in range(count)))
    except asyncio.CancelledError:
        return f"{ended} of {count} ended"
    return f"all {count} ended"


def work_of(name: str, url: httpx.URL) -> Callable[[], Awaitable[str]]:
    """The work of a case, all of it prepared: what takes time here would be taken for the server's."""
    if name in CONNECTIONS:
        return partial(connections, url, *CONNECTIONS[name])
    return partial(send, url, BODIES[name]())


async def measure(url: str, only: str, found: dict[str, Any]) -> None:
    """Add each case to `found`, and write the section after it."""
    async with real(url) as (client, idle):
        before = await seeded(client)
        await watch(client, lambda: asyncio.sleep(3, ""))  # warms up
        alone = await watch(client, None)
        for name in CASES:
            if not re.search(only, name):
                continue
            print(name, file=sys.stderr)
            beside = await watch(client, work_of(name, httpx.URL(url)))
            began = time.perf_counter()
            left = await idle()
            beside.rest_s = time.perf_counter() - began
            assert not left, f"{name}: {left}"
            assert await seeded(client) == before, f"{name}: a seeded answer is another one than before"
            found[name] = {"alone": asdict(alone), "beside": asdict(beside)}
            report({key: found[key] for key in CASES if key in found})


def kept() -> dict[str, Any]:
    """The cases that were measured before, on this processor and with these versions."""
    path = RESULTS / "hostile.json"
    before = json.loads(path.read_text()) if path.exists() else {"machine": {}, "results": {}}
    here = {name: value for name, value in machine().items() if name != "date"}
    return before["results"] if here.items() <= before["machine"].items() else {}


def report(found: dict[str, Any]) -> None:
    """Write the section."""
    lines = [
        "One hostile client beside one that asks for `/health` 20 times a second and one with a plain chat of "
        f"{CHAT['max_tokens']} tokens after another, while the hostile request runs (at most {WATCH_S:g} s, then it hangs "
        "up), and the same two alone before. `/health`: the slowest answer; chats: the median, as a multiple of that "
        "alone. `rest`: seconds from the end of the hostile request to a server with nothing to do.",
        "",
        "| hostile client | ended | its seconds | /health alone, ms | /health, ms | chat alone, ms | chat | rest, s | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    worst, slowest = 0.0, 0.0
    for name, case in found.items():
        alone, beside = case["alone"], case["beside"]
        health, chat = (
            max(beside["health_ms"]),
            statistics.median(beside["chat_ms"]) / statistics.median(alone["chat_ms"]),
        )
        worst, slowest = max(worst, health), max(slowest, chat)
        met = verdict(max(health / HEALTH_MS, chat / SLOWER), 1, at_most=True)
        lines.append(
            f"| {name} | {beside['ended']} | {beside['seconds']:.1f} | {max(alone['health_ms']):.0f} | {health:.0f} | "
            f"{statistics.median(alone['chat_ms']):.0f} | {chat:.2f} | {beside['rest_s']:.1f} | {met} |"
        )
    targets = [
        Target(
            "slowest `/health` beside a hostile client", f"<= {HEALTH_MS:g} ms", f"{worst:.0f} ms", worst <= HEALTH_MS
        ),
        Target("a plain chat beside a hostile client / alone", f"<= {SLOWER:g}", f"{slowest:.2f}", slowest <= SLOWER),
    ]
    write_section("hostile", "Beside hostile clients", "make bench-hostile", lines, found, targets)


def main(only: str) -> None:
    """Run the bench."""
    with TemporaryDirectory() as folder:
        server = Serve(Path(folder) / "log", "--max-model-len", "2048")
        try:
            server.wait(lambda: server.ready() == 200, START_S)
            asyncio.run(measure(server.url, only, kept() if only else {}))
            status = server.end(signal.SIGTERM, END_S)
            log = server.log.read_text()
            print(
                f"SIGTERM ended it with status {status}, no process is left; {log.count('Traceback')} tracebacks in its log"
            )
        finally:
            server.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name matches this expression; others stay as they were")
    main(parser.parse_args().only)
