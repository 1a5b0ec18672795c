"""A whole load test: find the model, warm up, run the load or the sweep, make the result."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import aiohttp

from guiderail.loadtest.client.http import Client
from guiderail.loadtest.load.plan import Plan, Requests
from guiderail.loadtest.load.runner import Load, Run, Watcher, run_load, warm_up
from guiderail.loadtest.load.sweep import Sweep, sweep_result
from guiderail.loadtest.load.traffic import TrafficClass
from guiderail.loadtest.loadtest_error import LoadtestError
from guiderail.loadtest.report.records import Outcome
from guiderail.loadtest.report.result import Reporting, result_of

# Warm-up requests come from a plan of their own, so that measured requests do not depend on how many there were.
WARM_UP_SEED = 2**31

T = TypeVar("T")
Watch = Callable[[str, Load], Watcher]


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a load test. If `requests.model` and `about.model` are empty, the server's first model is taken."""

    requests: Requests
    classes: Sequence[TrafficClass]
    load: Load
    about: Reporting
    sweep: Sweep | None = None
    seed: int = 0
    num_warmups: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    ready_timeout_s: float = 0.0
    insecure: bool = False
    detailed: bool = False


async def measure(
    options: Options, watch: Watch, stop: asyncio.Event | None = None
) -> tuple[dict[str, Any], list[Run]]:
    """Run a load test; return its result (result.py, sweep.py) and its runs; the one that finds saturation comes first.

    `stop` ends it early with the result so far, that of the saturation alone if it comes then. Raises LoadtestError if
    the server cannot be reached at all, or `stop` comes before the load.
    """
    client = Client(options.headers, timeout_s=options.timeout_s, insecure=options.insecure, keep_text=options.detailed)
    stop = stop or asyncio.Event()
    async with client:
        model = await _unless(stop, _model(client, options))
        requests = replace(options.requests, model=model)
        plan = Plan(options.classes, requests, options.seed)
        about = replace(options.about, model=model, prompts=_about_prompts(plan, options))
        await _unless(stop, _warm_up(client, Plan(options.classes, requests, options.seed + WARM_UP_SEED), options))

        async def one(title: str, load: Load) -> Run:
            with closing(watch(title, load)) as watcher:
                return await run_load(client, plan, load, seed=options.seed, watcher=watcher, stop=stop)

        if options.sweep is None:
            run = await one("load", options.load)
            return result_of(run, about, detailed=options.detailed), [run]
        return await _sweep(options.sweep, options, about, one, stop)


async def _sweep(
    sweep: Sweep, options: Options, about: Reporting, one: Callable[[str, Load], Any], stop: asyncio.Event
) -> tuple[dict[str, Any], list[Run]]:
    runs: list[Run] = []
    saturation = None
    if (first := sweep.first(options.load)) is not None:
        runs.append(await one("saturation", first))
        saturation = result_of(runs[0], about, detailed=options.detailed)
        if stop.is_set():
            return saturation, runs
        if not saturation["completed"]:
            raise LoadtestError(f"no request completed at saturation: {_first_error(runs[0])}")
    stages: list[dict[str, Any]] = []
    for load in sweep.loads(options.load, saturation["request_throughput"] if saturation else None):
        if stop.is_set() and stages:
            break
        runs.append(await one(f"{load.offered_rps:g} req/s", load))
        stages.append(result_of(runs[-1], about, detailed=options.detailed))
    return sweep_result(stages, saturation, sweep, about), runs


async def _unless(stop: asyncio.Event, work: Coroutine[None, None, T]) -> T:
    """The result of work that comes before the load. Raises LoadtestError if it is stopped before that is there."""
    task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise LoadtestError("stopped before the load began; there is no result")
        return task.result()
    finally:
        for each in (task, stopping):
            each.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)


async def _model(client: Client, options: Options) -> str:
    url = f"{options.requests.base_url}/v1/models"
    deadline = time.monotonic() + options.ready_timeout_s
    while True:
        try:
            if options.requests.model and not options.ready_timeout_s:
                return options.requests.model
            body = await client.get_json(url)
            return options.requests.model or str(body["data"][0]["id"])
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            if time.monotonic() >= deadline:
                raise LoadtestError(f"{url}: {error or type(error).__name__}") from error
            await asyncio.sleep(0.5)
        except (KeyError, IndexError, TypeError, RecursionError) as error:
            raise LoadtestError(f"{url}: no model is listed; name one with --model") from error


async def _warm_up(client: Client, plan: Plan, options: Options) -> None:
    if not options.num_warmups:
        return
    records = await warm_up(client, plan, options.num_warmups, options.load.max_concurrency)
    if not any(record.outcome is Outcome.COMPLETED for record in records):
        raise LoadtestError(f"no warm-up request completed: {records[0].outcome}: {records[0].error}")


def _about_prompts(plan: Plan, options: Options) -> dict[str, Any]:
    """Facts by which a reader can judge how much a prefix cache could help."""
    return {"different": plan.prompt_counts, "unique_prefix": options.requests.unique_prompts}


def _first_error(run: Run) -> str:
    return next((f"{r.outcome}: {r.error}" for r in run.records if r.error), "nothing was sent")
