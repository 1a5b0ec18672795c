"""`guiderail serve`: starts the engine and the rewards, serves, and leaves no process behind.

SIGTERM and Ctrl-C are honoured at every stage (ending.py). While the engine is starting its processes are ended
directly; once it serves, requests in flight get the drain time and the engine is shut down in order.
"""

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import fields
from pathlib import Path

from guiderail.guides.core.errors import EngineUnavailable, PluginError
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.registry import load_guides, load_rewards, make_rewards
from guiderail.guides.core.reward import Reward
from guiderail.guides.prompters import PROMPTERS, load_style, urial_with
from guiderail.guides.scoring.pipeline import Scorers
from guiderail.server.announce import example, say, steps
from guiderail.server.api.app import create_app
from guiderail.server.api.listener import Listener, raise_open_files
from guiderail.server.api.request_log import start_logging
from guiderail.server.ending import Ending, end_processes
from guiderail.server.engines.null import NoEngine
from guiderail.server.engines.policies import check_adapter
from guiderail.server.engines.remote_policy import RemotePolicy
from guiderail.server.engines.served_engine import LocalEngine, ServedEngine
from guiderail.server.engines.supervised import SupervisedEngine
from guiderail.server.engines.vllm import forkserver
from guiderail.server.engines.vllm.engine import build
from guiderail.server.engines.vllm.engine_args import EngineSettings, default_max_num_seqs
from guiderail.server.engines.vllm.environment import on_cpu
from guiderail.server.keys import Keys
from guiderail.server.memory.shares import EngineShare, Plan
from guiderail.server.metrics import Metrics
from guiderail.server.models import catalogue, cpu_features
from guiderail.server.models.model_fingerprint import fingerprint
from guiderail.server.models.renderer import ChatRenderer
from guiderail.server.openai_errors import ApiError
from guiderail.server.placement import place
from guiderail.server.requests.admission import Admission
from guiderail.server.requests.resolve import Resolver
from guiderail.server.rewards.models.loading import check_source, model_reward
from guiderail.server.rewards.models.sentence_embedder import SentenceEmbedder
from guiderail.server.rewards.pairwise_judge import ServedJudge
from guiderail.server.scoring import calibration_file as calibration_store
from guiderail.server.scoring.batcher import BatchingScorer
from guiderail.server.scoring.calibration_file import StoredCalibration
from guiderail.server.scoring.calibrator import Calibrator
from guiderail.server.settings import Settings, SettingsError
from guiderail.server.state import ServerState
from guiderail.server.workers import Workers

SWITCH_S = 0.001  # threads that compute hand the interpreter on: the event loop waits for it at each of its turns
END_S = 15.0  # of the shutdown, after the time that requests get: engines need some seconds


def serve(settings: Settings) -> int:
    """Serve until told to stop. Raises GuiderailError if the server cannot start."""
    start_logging()
    sys.setswitchinterval(SWITCH_S)
    raise_open_files()
    import uvloop

    try:
        status = uvloop.run(_serve(settings))
    except KeyboardInterrupt:
        return 130
    signal.setitimer(signal.ITIMER_REAL, 0)  # the interpreter's own exit may be slow, and no handler runs in it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no thread that still computes, of which executors wait at the exit, keeps the process


async def _serve(settings: Settings) -> int:
    stop = asyncio.Event()
    began = time.monotonic()
    ending = Ending(stop, settings.drain_timeout_s + END_S)
    with ending, closing(Listener(settings.host, settings.port)) as listener:
        async with running(settings, ending) as state:
            app = create_app(state)
            if settings.api_key_file is not None:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, state.keys.reload)
            gc.collect()
            gc.freeze()  # a full collection walks all that was imported and holds up every stream meanwhile
            say(f"ready after {time.monotonic() - began:.0f} s on {listener.url}")
            say(f"try: {example(settings, listener.url, chat=state.renderer.has_chat_template)}")
            await listener.run(app, state, stop, say)
            gc.unfreeze()  # else the interpreter's exit leaves extension modules' objects, and nanobind lists them
    say("stopped")
    return 0


@asynccontextmanager
async def running(settings: Settings, ending: Ending, *, engine: bool = True) -> AsyncIterator[ServerState]:
    """The server's state with everything started; on leaving all of it is ended, processes included.

    `engine=False` leaves the engine out (server/engines/null.py). Signals are orderly once it has started. Raises
    GuiderailError if something does not start.
    """
    for name, spec in settings.reward.items():
        check_source(name, spec)
    guides, plugins = load_guides(settings.guides), load_rewards(settings.rewards)
    for name in settings.reward.keys() & plugins.keys():
        raise SettingsError(f"--reward {name}: there is already a reward of this name")
    if engine and not settings.batch_invariant:  # whose environment vLLM reads when it is imported
        forkserver.start_preload()
    step = steps()
    metrics = Metrics(settings.model_name)
    step(f"preparing {settings.model}")
    path = await asyncio.to_thread(catalogue.resolve, settings.model, settings.cache, say)
    say(await asyncio.to_thread(cpu_features.report))
    plan = await asyncio.to_thread(place, settings, path if engine else None, say, engine_on_cpu=on_cpu)
    for line in plan.lines:
        say(line)
    if plan.engine is not None and settings.max_num_seqs is None:
        rows = await asyncio.to_thread(default_max_num_seqs, settings.tensor_parallel_size)
        settings = settings.model_copy(update={"max_num_seqs": rows})
    remote = {name: RemotePolicy(name, spec) for name, spec in settings.policy.items()} if engine else {}
    served = (
        SupervisedEngine(lambda: _build(settings, path, plan.engine, step), on_restart=metrics.restarted, remote=remote)
        if engine
        else NoEngine()
    )
    state: ServerState | None = None
    try:
        state = await _prepare(settings, guides, plugins, path, plan, served, metrics, remote, step)
        ending.orderly = True
        yield state
    finally:
        if engine:
            say("ending the engine")
        processes = ending.children()
        for reward in state.rewards.values() if state is not None else ():
            await reward.close()
        await served.close()
        for policy in remote.values():
            await policy.close()
        if engine:
            forkserver.end_preload()
        end_processes(processes)


async def _build(settings: Settings, path: str, share: EngineShare | None, step: Callable[[str], None]) -> LocalEngine:
    """Start vLLM. What the engine and the server call the same is the same."""
    embedded = catalogue.EMBEDDED.get(settings.model)
    same = {f.name: getattr(settings, f.name) for f in fields(EngineSettings) if f.name in Settings.model_fields}
    own = {
        "model": path,
        "max_model_len": settings.max_model_len or (embedded.max_model_len if embedded else None),
        "gpu_memory_utilization": share.utilization if share else settings.gpu_memory_utilization,
        "max_num_seqs": settings.rows,
        "enforce_eager": False if settings.compile else settings.enforce_eager or None,
        "adapters": tuple(settings.lora.items()),
    }
    return await build(EngineSettings(**same | own), step)


async def _prepare(
    settings: Settings,
    guides: Mapping[str, type[Guide]],
    plugins: Mapping[str, type[Reward]],
    path: str,
    plan: Plan,
    engine: SupervisedEngine | NoEngine,
    metrics: Metrics,
    remote: Mapping[str, RemotePolicy],
    step: Callable[[str], None],
) -> ServerState:
    # What can be wrong in the configuration is found before the engine takes its time.
    rewards = make_rewards(plugins)
    for name, spec in settings.reward.items():
        rewards[name] = model_reward(
            spec, settings.cache, say, plan.rewards.get(name), plain_completions=settings.plain_completions
        )
    for name, folder in settings.lora.items():
        check_adapter(name, folder, settings.max_lora_rank)
    for name in remote.keys() & {settings.model_name, *settings.lora}:
        raise SettingsError(f"--policy {name}: the model or an adapter has this name")
    renderer = await asyncio.to_thread(
        ChatRenderer,
        path,
        settings.chat_template,
        allow_control_tokens=settings.allow_control_tokens,
        plain_completions=settings.plain_completions,
        context=lambda: engine.max_model_len,
    )
    services = Services(
        engine, renderer, frozenset(settings.lora), settings.model_name, frozenset(remote), lambda: engine.max_model_len
    )
    stored = {file: calibration_store.load(file) for file in settings.calibration}
    state = assemble(settings, engine, renderer, guides, rewards, services, metrics, list(stored.values()), plan.beside)
    try:
        await state.resolver.vet_configured()
    except ApiError as error:
        raise SettingsError(f"the configured alignment, profiles or limits are wrong: {error}") from error
    for policy in remote.values():
        await policy.start(renderer)
    engine_comes = isinstance(engine, SupervisedEngine)
    if plan.engine is None:  # on CPU; on GPUs the engine takes its share of the memory first
        step("loading rewards")
        rewards_left: Mapping[str, Reward] = await start_rewards(rewards, services, engine_comes=engine_comes)
    else:
        rewards_left = rewards
    await engine.start()
    if engine.dtype:
        say(f"the engine computes in {engine.dtype}")
    if rewards_left:
        step(f"loading rewards: {', '.join(rewards_left)}")
        await start_rewards(rewards_left, services)
    if stored:
        revision = await asyncio.to_thread(fingerprint, path)
        for file, each in stored.items():
            reward = rewards.get(each.reward)
            calibration_store.check(each, file, revision, None if reward is None else reward.revision())
    return state


async def start_rewards(
    rewards: Mapping[str, Reward], services: Services, *, engine_comes: bool = False
) -> dict[str, Reward]:
    """Start every reward. Raises PluginError naming the one that does not.

    engine_comes: the engine is yet to start; what asks for it is returned, to be started then.
    """
    waiting: dict[str, Reward] = {}
    for name, reward in rewards.items():
        try:
            await reward.start(services)
        except Exception as error:
            if engine_comes and isinstance(error, EngineUnavailable):
                waiting[name] = reward
                continue
            raise PluginError(
                f"reward '{name}' does not start: {error!r}; fix it, or leave it out with --rewards"
            ) from error
    return waiting


def assemble(
    settings: Settings,
    engine: ServedEngine,
    renderer: ChatRenderer,
    guides: Mapping[str, type[Guide]],
    rewards: Mapping[str, Reward],
    services: Services,
    metrics: Metrics,
    stored: Sequence[StoredCalibration] = (),
    encoder_device: str = "cpu",
) -> ServerState:
    """Join the parts to a server state; engine and rewards may start later. Raises SettingsError."""
    try:
        styles = {name: load_style(Path(file).expanduser()) for name, file in settings.urial.items()}
        prompters = {**PROMPTERS, "urial": urial_with(styles)}
        resolver = Resolver(
            guides, rewards, services, settings.alignment, settings.profiles, settings.limits, prompters
        )
    except (OSError, ValueError) as error:
        raise SettingsError(f"--urial: {error}") from error
    except ApiError as error:
        raise SettingsError(f"the configured alignment, profiles or limits are wrong: {error}") from error
    scorer = BatchingScorer(rewards, metrics, debug=settings.debug)
    scorers = Scorers(
        scorer,
        Calibrator(stored, metrics),
        SentenceEmbedder(settings.encoder, encoder_device),
        # Question, two answers and the criterion have to fit the context, which only a started engine knows.
        ServedJudge(services, max_tokens=lambda: min(512, engine.max_model_len // 4)),
    )
    admission = Admission(settings.limits, settings.rows, metrics)
    return ServerState(
        settings, engine, renderer, guides, rewards, resolver, scorer, scorers, admission,
        metrics, Keys(settings.api_key, settings.api_key_file), Workers(), int(time.time()),
    )  # fmt: skip
