"""The start follows the plan of memory: it says it, gives everybody its part, and gives it again after an engine's death."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedEngine
from kernel_checks import needs_gpu
from tiny_reward import tiny_head
from waiting import until

from guiderail.guides.core.types import SamplingSpec, TokenPrompt
from guiderail.server import runtime as serve
from guiderail.server.ending import Ending
from guiderail.server.engines.engine_stats import EngineStats
from guiderail.server.engines.vllm.engine_args import EngineSettings
from guiderail.server.memory.devices import Gpu, gpus
from guiderail.server.memory.kv_pool import GIB
from guiderail.server.memory.shares import Plan, PlanError, RewardShare
from guiderail.server.settings import Settings, SettingsError, load
from guiderail.server.state import ServerState

FEW: dict[str, Any] = {"rewards": ["length"]}  # of the built-in ones; the tiny tokenizer has no word for "Yes"


class Dying(ScriptedEngine):
    """An engine that dies when it is told to."""

    stats = EngineStats()

    async def close(self) -> None:
        pass

    async def cause_of_death(self) -> str:
        return "it was told to"


@asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[ServerState]:
    with Ending(asyncio.Event()) as ending:
        async with serve.running(settings, ending) as state:
            yield state


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineSettings, Dying]]:
    """Settings that engines were built with, and the engines."""
    made: list[tuple[EngineSettings, Dying]] = []

    async def build(settings: EngineSettings, say: Callable[[str], None]) -> Any:
        made.append((settings, Dying()))
        return made[-1][1]

    monkeypatch.setattr(serve, "build", build)
    monkeypatch.setattr(serve, "default_max_num_seqs", lambda tensor_parallel_size: 1024)
    return made


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Plans for so many GPUs, though rewards run on the CPU; returns where each was placed."""

    def pretend(count: int) -> list[str]:
        placed: list[str] = []
        there = tuple(Gpu(i, "NVIDIA L4", 22 * GIB, 22 * GIB) for i in range(count))

        def place(settings: Settings, path: str | None, say: Any, **options: Any) -> Plan:
            return placement(settings, path, say, engine_on_cpu=lambda: False, found=lambda: there)

        def on_cpu(spec: Any, cache: Path, say: Any, share: RewardShare | None, **more: Any) -> Any:
            placed.append(share.device if share else "anywhere")
            return neural(spec, cache, say, share and replace(share, device="cpu", limit=None))

        placement, neural = serve.place, serve.model_reward
        monkeypatch.setattr(serve, "place", place)
        monkeypatch.setattr(serve, "model_reward", on_cpu)
        return placed

    return pretend


async def test_the_plan_is_said_kept_and_kept_again(
    built: list[tuple[EngineSettings, Dying]],
    with_gpus: Callable[[int], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    placed = with_gpus(1)
    head = tiny_head(tmp_path)
    settings = load({**FEW, "model": str(tmp_path / "base"), "reward": {"r": {"path": head, "dtype": "float32"}}}, None)
    async with started(settings) as state:
        assert placed == ["cuda:0"]
        first, engine = built[0]
        assert 0.8 < first.gpu_memory_utilization < 0.88
        assert (first.enforce_eager, first.kv_cache_gb, first.max_num_batched_tokens) == (None, None, None)
        assert first.max_num_seqs == state.settings.rows == 1024
        engine.up = False
        await until(lambda: len(built) == 2, 60)
        assert built[1][0] == first  # not a share of what is free now, when the reward holds its part
    said = capsys.readouterr().err
    assert "guiderail: GPU 0 (NVIDIA L4, 22.0 GiB of 22.0 GiB free): engine 1" in said
    assert "; reward r " in said


async def test_without_a_gpu_all_is_as_the_operator_says(
    built: list[tuple[EngineSettings, Dying]], with_gpus: Callable[[int], list[str]], tmp_path: Path
) -> None:
    placed = with_gpus(0)
    tiny_head(tmp_path)
    options = {
        **FEW,
        "model": str(tmp_path / "base"),
        "kv_cache_gb": 0.5,
        "max_num_batched_tokens": 4096,
        "compile": True,
    }
    async with started(
        load(options | {"reward": {"r": {"path": str(tmp_path / "head"), "dtype": "float32"}}}, None)
    ) as state:
        assert state.settings.rows == 128
        assert placed == ["anywhere"]
    (found,) = (settings for settings, _ in built)
    assert (found.kv_cache_gb, found.max_num_batched_tokens, found.enforce_eager) == (0.5, 4096, False)


async def test_what_does_not_fit_is_said_before_anything_starts(
    built: list[tuple[EngineSettings, Dying]], with_gpus: Callable[[int], list[str]], tmp_path: Path
) -> None:
    with_gpus(1)
    head = tiny_head(tmp_path)
    options = {"model": str(tmp_path / "base"), "reward": {"r": {"path": head, "kv_gb": 30}}}
    with pytest.raises(PlanError, match="the reward's kv_gb"):
        async with started(load(options, None)):
            pass
    assert built == []


@pytest.mark.parametrize(
    ("flags", "eager"), [({}, None), ({"enforce_eager": True}, True), ({"compile": True}, False)], ids=str
)
async def test_graphs_are_left_to_the_device(
    flags: dict[str, bool], eager: bool | None, built: list[tuple[EngineSettings, Dying]], tmp_path: Path
) -> None:
    """Also of the embedded default, which was eager on a GPU."""
    await serve._build(load(flags, None), str(tmp_path), None, print)
    assert built[0][0].enforce_eager is eager


def test_compiling_and_not_compiling_exclude_each_other() -> None:
    with pytest.raises(SettingsError, match="compile and enforce_eager exclude each other"):
        load({"compile": True, "enforce_eager": True}, None)


def test_the_encoder_goes_where_this_process_is_anyway() -> None:
    assert Plan().beside == "cpu"
    assert (
        Plan(rewards={"a": RewardShare("cuda:0", 1, 0.3), "b": RewardShare("cuda:1", 1, None, 0.2)}).beside == "cuda:1"
    )


def test_without_cuda_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus() == ()


def test_gpus_are_asked_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Output of the process, or what is said if it fails; it has torch from here, and no GPU."""
    import torch

    from guiderail.server.memory import devices

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpus() == ()  # there are none: the process counts them itself
    fake = "import json; print('noise'); print(json.dumps([dict(index=0, name='x', total=9, free=5)]))"
    monkeypatch.setattr(devices, "PROBE", fake)
    assert gpus() == (Gpu(0, "x", 9, 5),)
    monkeypatch.setattr(devices, "PROBE", "raise SystemExit('CUDA error: out of memory')")
    with pytest.raises(Exception, match=r"cannot be asked for their memory: CUDA error: out of memory"):
        gpus()


@needs_gpu
def test_a_real_gpu_is_asked_without_a_context_here() -> None:
    import torch

    (first, *_) = gpus()
    assert 0 < first.free <= first.total
    assert first.name == torch.cuda.get_device_name(0)


@needs_gpu
@pytest.mark.timeout(900)
async def test_a_real_gpu_serves_engine_and_reward_and_the_engine_again(model_path: str, reward_head: str) -> None:
    """Both fit in what was planned, graphs are captured, and an engine that was killed comes back beside the reward."""
    import psutil

    settings = load({"reward": {"head": {"path": reward_head}}, "gpu_memory_utilization": 0.5}, None)

    async def answer(state: ServerState) -> int:
        spec = SamplingSpec(8, 0.0, ignore_eos=True)
        async with state.engine.generate([TokenPrompt(tuple(range(300, 340)))], spec) as rollouts:
            return sum([len(delta.token_ids) async for delta in rollouts])

    async with started(settings) as state:
        inner: Any = state.engine
        config = inner._inner._llm.vllm_config
        assert not config.model_config.enforce_eager
        assert config.cache_config.gpu_memory_utilization < 0.5
        assert config.scheduler_config.max_num_seqs == state.settings.rows
        assert await answer(state) == 8
        (core,) = (p for p in psutil.Process().children(recursive=True) if "EngineCore" in "".join(p.cmdline()))
        core.kill()
        await until(lambda: not state.engine.up, 60)
        await until(lambda: state.engine.up, 300)
        assert await answer(state) == 8
