"""The arguments that vLLM is started with, on CPU and as it would be on GPUs, and the environment that its processes get."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guiderail.server.engines.process_monitor import ProcessMonitor
from guiderail.server.engines.vllm.engine_args import (
    CPU_KV_GB,
    EngineSettings,
    base_args,
    default_max_num_seqs,
    engine_args,
    fitting_args,
    generating_args,
    usage_context,
)
from guiderail.server.engines.vllm.environment import prepare_environment
from guiderail.server.engines.vllm.launch import start

PLAIN = EngineSettings("model")


def test_a_gpu_has_graphs_and_its_share_of_the_memory() -> None:
    args = generating_args(EngineSettings("model", gpu_memory_utilization=0.66), cpu=False)
    assert args["enforce_eager"] is False
    assert args["gpu_memory_utilization"] == 0.66
    assert args["dtype"] == "auto"
    for name in ("kv_cache_memory_bytes", "block_size", "device_ids", "distributed_executor_backend"):
        assert name not in args  # as vLLM has them on a GPU
    assert (args["max_num_seqs"], args["max_num_batched_tokens"]) == (None, None)


def test_a_gpu_honours_what_the_operator_says() -> None:
    said = EngineSettings(
        "model",
        kv_cache_gb=1.5,
        max_num_seqs=7,
        max_num_batched_tokens=512,
        enforce_eager=True,
        device=1,
        dtype="float16",
    )
    args = base_args(said, cpu=False)
    assert args["kv_cache_memory_bytes"] == 3 * 2**29
    assert args["device_ids"] == [1]
    assert (args["max_num_seqs"], args["max_num_batched_tokens"], args["enforce_eager"]) == (7, 512, True)
    assert args["dtype"] == "float16"


def test_a_cpu_runs_eager_with_keys_and_values_of_a_fixed_size() -> None:
    args = generating_args(PLAIN, cpu=True)
    assert args["enforce_eager"] is True
    assert args["kv_cache_memory_bytes"] == CPU_KV_GB * 2**30
    assert "gpu_memory_utilization" not in args
    assert base_args(EngineSettings("model", enforce_eager=False), cpu=True)["enforce_eager"] is False
    assert base_args(EngineSettings("model", kv_cache_gb=0.25), cpu=True)["kv_cache_memory_bytes"] == 2**28


def fitted(settings: EngineSettings = PLAIN, **facts: Any) -> Any:
    known = {"cpu": False, "max_model_len": 4096, "async_scheduling": True, "v2": True}
    return fitting_args(settings, **(known | facts))


def test_what_depends_on_the_model() -> None:
    gpu = fitted()
    assert gpu["scheduler_cls"].endswith(".AsyncGroupScheduler")
    assert "enable_chunked_prefill" not in gpu  # vLLM's default, which is on
    assert "max_num_batched_tokens" not in gpu
    assert gpu["enable_trace_replay"] is True
    assert fitted(async_scheduling=False)["scheduler_cls"].endswith(".GroupScheduler")
    assert len(fitted(v2=False)["logits_processors"]) == 2


@pytest.mark.parametrize("v2", [True, False])
def test_what_vllm_imports_by_name_is_there(v2: bool) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    args = fitted(v2=v2)
    named = [args["scheduler_cls"], base_args(PLAIN, cpu=True)["worker_extension_cls"]]
    for name in [*named, *(each.replace(":", ".") for each in args["logits_processors"])]:
        assert isinstance(resolve_obj_by_qualname(name), type)


@pytest.mark.parametrize(
    ("said", "context", "step"), [(None, 1024, 2048), (None, 8192, 8192), (4096, 4096, 4096), (6000, 4096, 6000)]
)
def test_a_cpu_reads_whole_prompts(said: int | None, context: int, step: int) -> None:
    args = fitted(EngineSettings("model", max_num_batched_tokens=said), cpu=True, max_model_len=context)
    assert (args["enable_chunked_prefill"], args["max_num_batched_tokens"]) == (False, step)


def test_a_step_too_small_for_a_whole_prompt_is_refused() -> None:
    small = EngineSettings("model", max_num_batched_tokens=512)
    with pytest.raises(ValueError, match="max_num_batched_tokens must hold a whole prompt, up to 1024 tokens"):
        fitted(small, cpu=True, max_model_len=1024)
    assert "max_num_batched_tokens" not in fitted(small, cpu=True, max_model_len=65_536)  # those are read in chunks


GIB = 2**30
CARDS = {
    "NVIDIA H200": (140 * GIB, 8192, 1024),
    "NVIDIA A100-SXM4-80GB": (79 * GIB, 2048, 256),
    "NVIDIA L4": (22 * GIB, 2048, 256),
}


@pytest.mark.parametrize("card", CARDS)
def test_batches_are_those_of_vllm_serve(card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own rule on a card of this name and size, asked as we ask it; without a usage context it says 2,048 and 128."""
    from vllm.engine import arg_utils

    total, tokens, rows = CARDS[card]
    platform = SimpleNamespace(
        get_device_total_memory=lambda: total, get_device_name=lambda: card, is_tpu=lambda: False, is_cpu=lambda: False
    )
    monkeypatch.setattr(arg_utils, "current_platform", platform)
    args = arg_utils.AsyncEngineArgs(**base_args(EngineSettings(str(tmp_path)), cpu=False), enable_chunked_prefill=True)
    model: Any = SimpleNamespace(max_model_len=131_072, is_multimodal_model=False)
    parallel: Any = SimpleNamespace(use_batched_dp_moe=False)
    args._set_default_max_num_seqs_and_batched_tokens_args(usage_context(), model, parallel)
    assert (args.max_num_batched_tokens, args.max_num_seqs) == (tokens, rows)
    assert default_max_num_seqs(1) == rows


def test_on_this_cpu_batches_are_as_before() -> None:
    assert default_max_num_seqs(1) == 128


def test_the_configuration_is_made_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both times that one is made: to look at, and to start with."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    asked: list[Any] = []

    class Args:
        distributed_executor_backend = None
        disable_log_stats = True

        def __init__(self, **said: Any) -> None:
            self.said = said

        def create_engine_config(self, usage: Any = None) -> Any:
            asked.append(usage)
            scheduling = SimpleNamespace(async_scheduling=True)
            return SimpleNamespace(
                model_config=SimpleNamespace(max_model_len=512), scheduler_config=scheduling, use_v2_model_runner=True
            )

    monkeypatch.setattr("vllm.engine.arg_utils.AsyncEngineArgs", Args)
    monkeypatch.setattr(AsyncLLM, "from_vllm_config", lambda config, **options: options["usage_context"])
    args = engine_args(PLAIN)
    assert args.said["scheduler_cls"].endswith("AsyncGroupScheduler")
    assert start(args, ProcessMonitor()) == UsageContext.OPENAI_API_SERVER
    assert asked == [UsageContext.OPENAI_API_SERVER] * 2


@pytest.mark.parametrize(("said", "method"), [(None, "spawn"), ("fork", "fork"), ("spawn", "spawn")])
def test_processes_are_spawned_unless_the_operator_says_otherwise(
    said: str | None, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.utils.system_utils import get_mp_context

    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", said or "")
    if said is None:
        monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    prepare_environment()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == method
    assert get_mp_context().get_start_method() == method


@pytest.mark.parametrize("cpu", [True, False])
def test_logits_come_out_in_float32_by_one_switch(cpu: bool) -> None:
    assert generating_args(PLAIN, cpu=cpu)["hf_overrides"] == {"head_dtype": "float32"}
    assert "hf_overrides" not in generating_args(EngineSettings("model", float32_logits=False), cpu=cpu)
    assert "hf_overrides" not in base_args(PLAIN, cpu=cpu), "a pooling engine has no such head"


def test_batch_invariance_on_cpu_is_kept_in_float32_alone() -> None:
    assert base_args(EngineSettings("model", batch_invariant=True), cpu=True)["dtype"] == "float32"
    for dtype in ("bfloat16", "float16", "half"):
        with pytest.raises(ValueError, match=f"float32 or auto, not {dtype}"):
            base_args(EngineSettings("model", dtype=dtype, batch_invariant=True), cpu=True)
        assert base_args(EngineSettings("model", dtype=dtype, batch_invariant=True), cpu=False)["dtype"] == dtype
