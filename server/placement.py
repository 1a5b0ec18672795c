"""Placement of models on GPUs: from settings to the needs of each model and to the plan of memory/shares.py."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.memory.devices import Gpu, gpus
from guiderail.server.memory.kv_pool import GIB, PASS_TOKENS
from guiderail.server.memory.model_size import read_shape, weight_bytes
from guiderail.server.memory.shares import EngineNeed, Plan, RewardNeed, RewardShare, plan
from guiderail.server.models import catalogue
from guiderail.server.rewards.models.loading import head_card, head_folder
from guiderail.server.rewards.models.reward_spec import RewardModelSpec
from guiderail.server.settings import Settings, SettingsError

ENGINE_TOKENS = 2048  # of the smallest step that vLLM is started with; it measures exactly, we only warn before
LIBRARIES = GIB // 2  # bytes that vLLM takes at least for graphs, sampling and communication


def place(
    settings: Settings,
    path: str | None,
    say: Callable[[str], None],
    *,
    engine_on_cpu: Callable[[], bool],
    found: Callable[[], tuple[Gpu, ...]] = gpus,
) -> Plan:
    """Plan for these settings on this machine.

    path: folder or Hub id of the engine's model; None without an engine. engine_on_cpu: returns True if vLLM is a CPU
    build; called only where there are GPUs. Raises PlanError for what does not fit, SettingsError for a device that
    cannot be used, and GuiderailError if a model's size cannot be determined.
    """
    local = {name: spec for name, spec in settings.reward.items() if not spec.urls}
    there = found()
    for name, spec in local.items():
        if spec.device not in (None, "cpu") and not there:
            raise SettingsError(f"--reward {name}: device={spec.device}, but no CUDA device is visible here")
    if not there:
        return Plan()
    on_cpu = (path is not None or any(spec.backend == "vllm" for spec in local.values())) and engine_on_cpu()
    engine = engine_need(settings, path) if path is not None and not on_cpu else None
    devices = {name: _device(name, spec, on_cpu) for name, spec in local.items()}
    needs = [
        reward_need(name, spec, devices[name], settings.cache, say)
        for name, spec in local.items()
        if devices[name] != "cpu"
    ]
    made = plan(there, settings.gpu_memory_utilization, engine, needs)
    on_host = {name: RewardShare("cpu") for name, device in devices.items() if device == "cpu"}
    return replace(made, rewards=made.rewards | on_host)


def engine_need(settings: Settings, path: str) -> EngineNeed:
    """Return the needs of the served model; what its configuration does not say is 0, and vLLM finds it out."""
    embedded = catalogue.EMBEDDED.get(settings.model)
    found = read_shape(path, settings.dtype)
    longest = settings.max_model_len or (embedded.max_model_len if embedded else None) or (found and found.longest)
    return EngineNeed(
        weights=_weights(path, settings.dtype, head=True),
        context=found.context(longest) if found and longest else 0,
        work=LIBRARIES + (found.work_token * ENGINE_TOKENS if found else 0),
        gpus=settings.tensor_parallel_size,
        kv=int(settings.kv_cache_gb * GIB) if settings.kv_cache_gb is not None else None,
    )


def _device(name: str, spec: RewardModelSpec, engines_on_cpu: bool) -> str | None:
    """Return the device on which the operator, or the installed vLLM, wants a reward model; None: any GPU."""
    if spec.backend == "vllm" and engines_on_cpu:
        if spec.device not in (None, "cpu"):
            raise SettingsError(f"--reward {name}: device={spec.device}, but the vLLM that is installed is for CPUs")
        return "cpu"
    if spec.backend == "vllm" and spec.device == "cpu":
        raise SettingsError(
            f"--reward {name}: device=cpu needs backend=packed, for the vLLM that is installed is for GPUs"
        )
    return None if spec.device == "cuda" else spec.device


def reward_need(
    name: str, spec: RewardModelSpec, device: str | None, cache: Path, say: Callable[[str], None]
) -> RewardNeed:
    """Return what a reward model needs on `device`, or on any GPU; policy and reference are counted as one.

    Raises GuiderailError if a model's files do not tell.
    """
    if spec.reference is not None:
        policy, reference = (
            _reward_need(name, spec, path, device, cache, say, head=True) for path in (spec.path, spec.reference)
        )
        return replace(
            policy,
            weights=policy.weights + reference.weights,
            work=max(policy.work, reference.work),
            kv_token=policy.kv_token + reference.kv_token,
            longest=min((each.longest for each in (policy, reference) if each.longest is not None), default=None),
        )
    return _reward_need(name, spec, spec.path, device, cache, say, head=False)


def _reward_need(
    name: str,
    spec: RewardModelSpec,
    path: str,
    device: str | None,
    cache: Path,
    say: Callable[[str], None],
    *,
    head: bool,
) -> RewardNeed:
    """Return what one model needs. head: with its LM head."""
    card = head_card(path) or {}
    where = catalogue.resolve(card.get("base", path), cache, say)
    found = read_shape(where, spec.dtype)
    weights = _weights(where, spec.dtype, head=head)
    if found is None or not weights:
        raise GuiderailError(f"--reward {name}: {path} has no configuration and safetensors that tell its size")
    if card:
        weights += (head_folder(path) / "head.safetensors").stat().st_size
    limits = [each for each in (found.longest, card.get("max_tokens")) if each is not None]
    return RewardNeed(
        name,
        spec.backend,
        weights,
        found.work_token * PASS_TOKENS + (LIBRARIES if spec.backend == "vllm" else 0),
        max(1, found.kv_token),  # a model without attention keeps none
        min(limits, default=None),
        device,
        int(spec.kv_gb * GIB) if spec.kv_gb is not None else None,
    )


def _weights(where: str, dtype: str, *, head: bool) -> int:
    try:
        return weight_bytes(where, dtype, head=head)
    except Exception as error:  # the Hub's client raises errors of many libraries
        raise GuiderailError(f"the size of {where} cannot be found out: {error}") from error
