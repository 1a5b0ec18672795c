"""Run the fuzz: over the app in process with a scripted engine, or over a real server."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from fakes import ScriptedEngine
from fuzz_check import Idle, describe, fault, seeded
from fuzz_strategies import Bodies
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from nasty_bodies import REQUESTS, Sent

SETTLE_S = 60.0  # for tasks that were told to end; longer marks a leak
SAMPLE, TIMES = 150, 4  # requests that are sent again, and how often, to see whether memory grows
SAME_EVERY = 250  # bodies, after which a seeded answer is asked for again


@dataclass
class Findings:
    """The faults, each with the smallest request that showed it."""

    count: int = 0
    sample: list[Sent] = field(default_factory=list)  # the last ones
    faults: dict[str, Sent] = field(default_factory=dict)

    def add(self, fault: str, sent: Sent) -> None:
        """Note a fault."""
        if fault not in self.faults or len(sent.content) < len(self.faults[fault].content):
            self.faults[fault] = sent

    def lines(self) -> list[str]:
        """A line for each fault, the request as nasty_bodies.py has it."""
        return [f"{fault}\n    {_short(repr(sent))}" for fault, sent in self.faults.items()]


def _short(text: str) -> str:
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-200:]}"


@asynccontextmanager
async def scripted(renderer: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Idle]]:
    """A client of the app over a scripted engine with all guides and all built-in rewards."""
    from guiderail.guides.core.interfaces import Services
    from guiderail.guides.core.registry import load_guides, load_rewards
    from guiderail.server.api.app import create_app
    from guiderail.server.metrics import Metrics
    from guiderail.server.runtime import assemble, start_rewards
    from guiderail.server.settings import Settings

    engine: Any = ScriptedEngine(vocab_size=49152)
    rewards = {name: cls() for name, cls in load_rewards().items() if cls.__module__.startswith("guiderail.")}
    guides = {name: cls for name, cls in load_guides().items() if cls.__module__.startswith("guiderail.")}
    services = Services(engine, renderer, model_name="fake")
    profiles: Any = {"brief": {"rewards": [{"name": "length"}]}}
    config = Settings(served_model_name="fake", profiles=profiles)
    await start_rewards(rewards, services)
    state = assemble(config, engine, renderer, guides, rewards, services, Metrics("fake"))
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await seeded(client)
        tasks, threads = len(asyncio.all_tasks()), threading.active_count()

        async def idle() -> str:
            end = time.monotonic() + SETTLE_S
            while True:
                left = {
                    "sequences": engine.num_running(),
                    "waiting requests": state.admission.waiting,
                    "requests in flight": state.metrics.in_flight,
                    "tasks": max(0, len(asyncio.all_tasks()) - tasks),
                    "threads": max(0, threading.active_count() - threads - 40),
                }
                if not any(left.values()):
                    return ""
                if time.monotonic() > end:
                    return "left behind: " + ", ".join(f"{n} {what}" for what, n in left.items() if n)
                await asyncio.sleep(0.01)

        yield client, idle
        for reward in rewards.values():
            await reward.close()


@asynccontextmanager
async def real(url: str) -> AsyncIterator[tuple[httpx.AsyncClient, Idle]]:
    """A client of a server that runs already."""
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(None)) as client:

        async def idle() -> str:
            end = time.monotonic() + SETTLE_S
            while True:
                found = (await client.get("/metrics")).text.splitlines()
                names = ("num_requests_running", "num_requests_waiting", "engine_rows")
                busy = [
                    line
                    for line in found
                    if line.startswith(tuple(f"guiderail:{n}" for n in names)) and not line.endswith(" 0.0")
                ]
                if not busy:
                    return ""
                if time.monotonic() > end:
                    return "left behind: " + ", ".join(busy)
                await asyncio.sleep(0.05)

        yield client, idle


async def corpus(client: httpx.AsyncClient, idle: Idle, findings: Findings) -> None:
    """Send the known requests."""
    for name, sent in REQUESTS.items():
        findings.count += 1
        if found := await fault(client, sent, idle):
            findings.add(f"{name}: {found}", sent)


def fuzz(
    loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient, idle: Idle, count: int, seed: int | None,
    each: Callable[[Findings], None] = lambda findings: None,
) -> Findings:  # fmt: skip
    """Send `count` requests on a loop that is not running. seed: None for the same requests each time.

    The same seeded answer is asked for now and then, and must stay what it was.
    """
    findings = Findings()
    bodies = Bodies(loop.run_until_complete(describe(client)))
    before = loop.run_until_complete(seeded(client))
    quiet = settings(
        max_examples=count, database=None, deadline=None, derandomize=seed is None, verbosity=Verbosity.quiet,
        phases=(Phase.generate,), suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    sample: deque[Sent] = deque(maxlen=SAMPLE)

    @quiet
    @given(st.data())
    def send(data: st.DataObject) -> None:
        sent = bodies.request(data.draw)
        findings.count += 1
        sample.append(sent)
        if found := loop.run_until_complete(fault(client, sent, idle)):
            findings.add(found, sent)
        if findings.count % SAME_EVERY == 0 and loop.run_until_complete(seeded(client)) != before:
            findings.add("a seeded answer is another one than before", sent)
        each(findings)

    (send if seed is None else hypothesis_seed(seed)(send))()
    if loop.run_until_complete(seeded(client)) != before:
        findings.add("a seeded answer is another one than before", Sent("GET", "/"))
    findings.sample = list(sample)
    return findings


async def growth(client: httpx.AsyncClient, idle: Idle, sample: Sequence[Sent], memory: Callable[[], int]) -> int:
    """Bytes by which memory grows when a sample is sent again and again; the first time is not counted.

    Hypothesis remembers what it has drawn, so that memory grows in a fuzz whatever the server does.
    """
    sizes = []
    for _ in range(TIMES):
        for sent in sample:
            await fault(client, sent, idle)
        sizes.append(memory())
    return sizes[-1] - sizes[0]
