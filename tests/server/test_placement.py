"""From settings to a plan: what is counted, where rewards may run, and what is refused before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_reward import tiny_head

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.memory.devices import Gpu
from guiderail.server.memory.kv_pool import GIB
from guiderail.server.memory.model_size import weight_bytes
from guiderail.server.memory.shares import Plan, PlanError
from guiderail.server.placement import engine_need, place, reward_need
from guiderail.server.settings import Settings, SettingsError, load

TWO = tuple(Gpu(i, "NVIDIA A100-SXM4-80GB", 80 * GIB, 79 * GIB) for i in range(2))


def planned(settings: Settings, path: str | None, gpus: tuple[Gpu, ...] = TWO, cpu_engines: bool = False) -> Plan:
    return place(settings, path, print, engine_on_cpu=lambda: cpu_engines, found=lambda: gpus)


def settings(tmp_path: Path, **options: Any) -> tuple[Settings, str]:
    """Settings with a reward `tiny`, which is a head, and a reward `remote`; and the folder of a model to serve."""
    head = tiny_head(tmp_path) if not (tmp_path / "head").exists() else str(tmp_path / "head")
    rewards = {
        "tiny": {"path": head, **options.pop("tiny", {})},
        "remote": {"path": head, "backend": "vllm", "url": "http://127.0.0.1:1"},
    }
    base = str(tmp_path / "base")
    return load({"model": base, "reward": rewards, "cache_dir": tmp_path, **options}, None), base


def test_a_reward_goes_where_the_engine_is_not(tmp_path: Path) -> None:
    made = planned(*settings(tmp_path))
    assert set(made.rewards) == {"tiny"}  # a remote one takes nothing here
    assert made.rewards["tiny"].device == "cuda:1"
    assert made.engine is not None
    assert len(made.lines) == 2


@pytest.mark.parametrize(("device", "there"), [("cuda:0", "cuda:0"), ("cuda", "cuda:1"), ("cpu", "cpu")])
def test_a_device_is_the_operators_choice(device: str, there: str, tmp_path: Path) -> None:
    made = planned(*settings(tmp_path, tiny={"device": device}))
    assert made.rewards["tiny"].device == there
    assert (made.rewards["tiny"].kv is None) == (device == "cpu")


@pytest.mark.parametrize(
    ("options", "gpus", "cpu_engines", "message"),
    [
        ({"device": "cuda:2"}, TWO, False, "--reward tiny: there is no cuda:2; there is cuda:0, cuda:1, and cpu"),
        ({"device": "cuda:0"}, (), True, "--reward tiny: device=cuda:0, but no CUDA device is visible here"),
        ({"device": "cuda"}, (), True, "no CUDA device"),
        ({"device": "cpu", "backend": "vllm"}, TWO, False, "device=cpu needs backend=packed"),
        ({"device": "cuda:1", "backend": "vllm"}, TWO, True, "the vLLM that is installed is for CPUs"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(
    options: dict[str, Any], gpus: tuple[Gpu, ...], cpu_engines: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises((PlanError, SettingsError), match=message):
        planned(*settings(tmp_path, tiny=options), gpus, cpu_engines)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:01", "cuda:-1", "mps"])
def test_what_is_no_device_is_refused_by_name(device: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"reward\.tiny\.device"):
        settings(tmp_path, tiny={"device": device})


def test_without_a_gpu_there_is_nothing_to_plan(tmp_path: Path) -> None:
    def never() -> bool:
        raise AssertionError("vLLM is imported, which takes seconds, where there is no GPU to plan for")

    for options in ({}, {"device": "cpu"}, {"backend": "vllm"}):
        made, path = settings(tmp_path, tiny=options)
        assert place(made, path, print, engine_on_cpu=never, found=lambda: ()) == Plan()


def test_an_engine_for_cpus_leaves_the_gpus_to_packed_rewards(tmp_path: Path) -> None:
    made = planned(*settings(tmp_path), cpu_engines=True)
    assert made.engine is None
    assert made.rewards["tiny"].device == "cuda:0"
    assert planned(*settings(tmp_path, tiny={"backend": "vllm"}), cpu_engines=True).rewards["tiny"].device == "cpu"


def test_without_an_engine_rewards_alone_are_planned(tmp_path: Path) -> None:
    made, _ = settings(tmp_path)
    found = planned(made, None)
    assert found.engine is None
    assert found.rewards["tiny"].utilization is None


def test_what_the_engine_needs_is_read_from_its_files(tmp_path: Path) -> None:
    made, path = settings(tmp_path)
    need = engine_need(made, path)
    assert need.weights == weight_bytes(path, "auto") > 0
    assert need.context == 2 * 2 * 2 * 16 * 2 * 96  # keys and values, layers, heads, size, bytes, positions
    assert (need.gpus, need.kv) == (1, None)
    chosen, _ = settings(tmp_path, max_model_len=64, kv_cache_gb=1.5, tensor_parallel_size=2, dtype="float32")
    need = engine_need(chosen, path)
    assert need.weights == 2 * weight_bytes(path, "auto")
    assert need.context == 2 * 2 * 2 * 16 * 4 * 64
    assert (need.gpus, need.kv) == (2, 3 * GIB // 2)


def test_a_model_that_transformers_does_not_know_is_left_to_vllm(tmp_path: Path) -> None:
    made, path = settings(tmp_path)
    config = Path(path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "brand-new"}))
    need = engine_need(made, path)
    assert (need.weights > 0, need.context) == (True, 0)


def test_what_a_reward_needs_is_read_from_its_base_and_its_card(tmp_path: Path) -> None:
    head = tiny_head(tmp_path, max_tokens=40)
    made, path = settings(tmp_path, tiny={"kv_gb": 0.25})
    need = reward_need("tiny", made.reward["tiny"], None, tmp_path, print)
    assert need.weights == weight_bytes(path, "auto") + (Path(head) / "head.safetensors").stat().st_size
    assert (need.longest, need.kv, need.kv_token) == (40, GIB // 4, 2 * 2 * 2 * 16 * 2)


def test_a_reward_of_unknown_size_is_refused(tmp_path: Path) -> None:
    made, path = settings(tmp_path)
    (Path(path) / "model.safetensors").unlink()
    with pytest.raises(
        GuiderailError, match=r"--reward tiny: .* has no configuration and safetensors that tell its size"
    ):
        planned(made, path)


def test_a_model_that_cannot_be_asked_for_its_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **options: Any) -> Any:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", offline)
    made, _ = settings(tmp_path)
    with pytest.raises(GuiderailError, match="the size of someone/nothing cannot be found out: offline"):
        planned(made, "someone/nothing")
