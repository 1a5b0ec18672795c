"""Loads reward models: a Hugging Face sequence classifier (folder or Hub id) or a Guiderail reward head.

A reward head is a folder with reward.json and head.safetensors, as `guiderail rewards train` writes it: a
small head on top of a base model. Weights are read from safetensors only, never from pickles. Of a model that
remote servers run only tokenizer and configuration are read here.
"""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.memory.shares import RewardShare
from guiderail.server.models import catalogue
from guiderail.server.models.model_fingerprint import fingerprint
from guiderail.server.remote.remote_options import api_key
from guiderail.server.rewards.models.backend import ModelReward, scoring_thread
from guiderail.server.rewards.models.conversation_tokens import ConversationEncoder
from guiderail.server.rewards.models.model_resources import (
    device_and_dtype,
    keep_to,
    pool_tokens,
    pooling_settings,
)
from guiderail.server.rewards.models.neural import LoadedReward, NeuralReward
from guiderail.server.rewards.models.policy_loading import implicit_reward
from guiderail.server.rewards.models.remote_reward import RemotePooler, RemoteReward, connect
from guiderail.server.rewards.models.reward_spec import RewardModelSpec
from guiderail.server.rewards.models.trained_head import require_head

BUNDLED = {path.name: path for path in sorted((Path(__file__).parent / "heads").glob("*")) if path.is_dir()}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder without its head, the head's weight [K, H] (float32) and the tokenizer."""

    decoder: Any
    heads: Any
    tokenizer: Any
    longest: int | None


def model_reward(
    spec: RewardModelSpec,
    cache: Path,
    say: Callable[[str], None],
    share: RewardShare | None = None,
    *,
    plain_completions: bool = False,
) -> ModelReward:
    """Return the reward of a spec; its model is loaded when it starts. Raises GuiderailError for a broken reward.json.

    share: where it runs and its part of the memory there; None: on the CPU, or alone on the first GPU.
    plain_completions: see ConversationEncoder.
    """
    if spec.reference is not None:
        return implicit_reward(spec, spec.reference, cache, say, share, plain_completions=plain_completions)

    def conversations(tokenizer: Any) -> ConversationEncoder:
        return ConversationEncoder(tokenizer, at_end_of_turn=card is not None, plain_completions=plain_completions)

    def packed() -> LoadedReward:
        keep_to(share)
        model = load_model(spec.path, cache, spec.dtype, say, share.device if share is not None else None)
        from guiderail.server.rewards.models.packed import PackedBackend, PackedRunner
        from guiderail.server.rewards.models.packed_decoder import token_bytes

        say(_computes_in(spec, model.decoder.dtype))
        size = token_bytes(model.decoder)
        reads = min((each for each in (model.longest, last_tokens) if each is not None), default=None)
        on_cpu = next(model.decoder.parameters()).device.type == "cpu"
        capacity = pool_tokens(spec, share, reads, size, say, on_cpu=on_cpu)
        runner = PackedRunner(model.decoder, model.heads, capacity=capacity)
        runner.warm_up()
        longest = min(model.longest or runner.longest, runner.longest)
        return LoadedReward(PackedBackend(runner, len(model.heads)), conversations(model.tokenizer), longest)

    async def load() -> LoadedReward:
        if spec.backend == "packed":
            return await asyncio.get_running_loop().run_in_executor(scoring_thread(), packed)
        if spec.urls:
            pooler, tokenizer = await _connect(spec, cache, say)
            return LoadedReward(pooler, conversations(tokenizer), pooler.longest)
        from transformers import AutoTokenizer

        from guiderail.server.engines.vllm.pooling import build_pooling

        loop = asyncio.get_running_loop()
        folder = await loop.run_in_executor(scoring_thread(), classifier_folder, spec.path, cache, say)
        settings = await loop.run_in_executor(scoring_thread(), pooling_settings, spec, folder, share, say)
        engine = await build_pooling(settings)
        say(_computes_in(spec, engine.dtype))
        return LoadedReward(engine, conversations(AutoTokenizer.from_pretrained(folder)), engine.longest)

    card = head_card(spec.path)
    last_tokens = (card or {}).get("max_tokens")
    kind = RemoteReward if spec.urls else NeuralReward
    return kind(load, spec.head, last_tokens=last_tokens, identity=lambda: _identity(spec, cache))


def check_source(name: str, spec: RewardModelSpec) -> None:
    """Refuse a `--reward NAME=PATH` that can be seen to lead nowhere, before anything takes its time.

    Raises GuiderailError naming the reward.
    """
    flag = f"--reward {name}:"
    for path in (spec.path, spec.reference) if spec.reference is not None else ():
        if head_card(path) is not None:
            raise GuiderailError(f"{flag} {path} is a reward head; policy and reference must be language models")
        catalogue.check_name(path, flag)
    card = head_card(spec.path)
    if card is not None:
        catalogue.check_name(str(card.get("base")), f"{flag} its base")
        if not spec.urls and not (head_folder(spec.path) / "head.safetensors").is_file():
            raise GuiderailError(f"{flag} {spec.path} has no head.safetensors")
        return
    where = Path(catalogue.check_name(spec.path, flag))
    if spec.urls:
        return
    if where.is_dir() and not any(where.glob("*.safetensors")):
        raise GuiderailError(f"{flag} {spec.path} has no weights in safetensors")
    # What is on the Hub is looked at when it is loaded.
    if spec.reference is None and (where.is_dir() or spec.path in catalogue.EMBEDDED):
        require_head(spec.path, str(where), flag)


def _computes_in(spec: RewardModelSpec, dtype: Any) -> str:
    return f"reward model {spec.path} computes in {str(dtype).removeprefix('torch.')}"


def _identity(spec: RewardModelSpec, cache: Path) -> str:
    """Return what tells a model's weights apart; of a remote one only its name is known."""
    if spec.urls:
        return f"remote-{spec.model or spec.path}"
    return fingerprint(str(head_folder(spec.path)) if head_card(spec.path) else catalogue.resolve(spec.path, cache))


async def _connect(spec: RewardModelSpec, cache: Path, say: Callable[[str], None]) -> tuple[RemotePooler, Any]:
    """Connect to the remote servers of a spec; return them and the tokenizer of its path."""
    key = api_key(spec.key_env)
    if key == "":
        raise GuiderailError(f"key_env={spec.key_env}: this environment variable is not set, or empty")
    loop = asyncio.get_running_loop()
    tokenizer, heads = await loop.run_in_executor(scoring_thread(), _description, spec.path, cache, say)
    probe = tokenizer("How many heads do you have?")["input_ids"]
    pooler = await connect(spec.urls, probe=probe, model=spec.model, key=key, heads=heads)
    return pooler, tokenizer


def _description(path: str, cache: Path, say: Callable[[str], None]) -> tuple[Any, int | None]:
    """Return a model's tokenizer and its number of heads (None where only the server knows)."""
    from safetensors import safe_open
    from transformers import AutoTokenizer, PretrainedConfig

    card = head_card(path)
    if card is not None:
        with safe_open(head_folder(path) / "head.safetensors", "numpy") as tensors:
            heads = tensors.get_slice("score.weight").get_shape()[0]
        return AutoTokenizer.from_pretrained(catalogue.resolve(card["base"], cache, say)), heads
    folder = Path(path).expanduser()
    where = str(folder) if folder.is_dir() else catalogue.resolve(path, cache, say)
    config, _ = PretrainedConfig.get_config_dict(where)
    is_classifier = any("ForSequenceClassification" in name for name in config.get("architectures") or ())
    heads = PretrainedConfig.from_dict(config).num_labels if is_classifier else None
    return AutoTokenizer.from_pretrained(where), heads


def classifier_folder(path: str, cache: Path, say: Callable[[str], None] = lambda text: None) -> str:
    """Return a folder or Hub id that vLLM loads as a sequence classifier; a reward head is joined to its base, once.

    Nothing is rounded on the way: the base keeps the dtype that it is stored in, the heads are float32.
    """
    folder, card = head_folder(path), head_card(path)
    if card is None:
        where = catalogue.resolve(path, cache, say)
        require_head(path, where)
        return where
    digest = catalogue.file_sha256(folder / "head.safetensors")[:12]
    target = cache / "rewards" / f"{folder.name}-{digest}-as-stored"
    if not target.exists():
        model = load_model(path, cache, "stored", say)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            made = Path(name) / "model"
            write_classifier(model, Path(catalogue.resolve(card["base"], cache, say)), made)
            made.rename(target)
    return str(target)


def write_classifier(model: LoadedModel, base: Path, target: Path) -> None:
    """Write decoder, heads and tokenizer as a Hugging Face sequence classifier into a new folder."""
    from safetensors.torch import save_file

    target.mkdir()
    weights = {f"model.{key}": value.contiguous().cpu() for key, value in model.decoder.state_dict().items()}
    weights["score.weight"] = model.heads.float().contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    kind = type(model.decoder).__name__.removesuffix("Model")
    config |= {
        "architectures": [f"{kind}ForSequenceClassification"],
        "id2label": {str(i): f"head{i}" for i in range(len(model.heads))},
        "label2id": {f"head{i}": i for i in range(len(model.heads))},
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for file in (*base.glob("tokenizer*"), *base.glob("chat_template*")):
        shutil.copy(file, target)


def head_folder(path: str) -> Path:
    """Return the folder of a reward head of this name or path, whether there is one or not."""
    return BUNDLED.get(path, Path(path).expanduser())


def head_card(path: str) -> dict[str, Any] | None:
    """Return a reward head's reward.json; None if there is none. Raises GuiderailError if it is broken."""
    file = head_folder(path) / "reward.json"
    if not file.is_file():
        return None
    try:
        card = json.loads(file.read_text())
    except ValueError as error:
        raise GuiderailError(f"{file}: {error}") from error
    if not isinstance(card, dict) or card.get("format") != "guiderail-reward-head" or card.get("version") != 1:
        raise GuiderailError(f"{file} is not a reward head of version 1")
    longest = card.get("max_tokens")
    if longest is not None and not (isinstance(longest, int) and longest > 0):
        raise GuiderailError(f"{file}: max_tokens must be a positive number")
    return card


def load_model(
    path: str,
    cache: Path,
    dtype: str = "auto",
    say: Callable[[str], None] = lambda text: None,
    device: str | None = None,
) -> LoadedModel:
    """Load a reward model; device and dtype as in device_and_dtype. Raises GuiderailError."""
    import torch
    from transformers import AutoTokenizer

    device, kind = device_and_dtype(device, dtype)
    card = head_card(path)
    if card is not None:
        return _load_head(head_folder(path), card, cache, kind, device, say)
    from transformers import AutoModelForSequenceClassification

    where = catalogue.resolve(path, cache, say)
    try:
        require_head(path, where)
        model = AutoModelForSequenceClassification.from_pretrained(where, dtype=kind, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise GuiderailError(f"reward model {path} does not load: {error}") from error
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise GuiderailError(f"reward model {path}: {type(model).__name__} has no linear head named 'score'")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    decoder = model.base_model.to(device)
    return LoadedModel(decoder, head.weight.detach().float(), AutoTokenizer.from_pretrained(where), longest)


def _load_head(
    folder: Path, card: dict[str, Any], cache: Path, kind: Any, device: str, say: Callable[[str], None]
) -> LoadedModel:
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    base = card["base"]
    embedded = catalogue.EMBEDDED.get(base)
    if embedded is not None and card.get("base_revision") not in (None, embedded.sha256):
        raise GuiderailError(f"{folder} was trained on another revision of {base}")
    where = catalogue.resolve(base, cache, say)
    decoder = AutoModel.from_pretrained(where, dtype=kind)
    tensors = load_file(folder / "head.safetensors")
    heads = tensors.pop("score.weight").float()
    if heads.shape[-1] != card["hidden_size"] or heads.shape[-1] != decoder.config.get_text_config().hidden_size:
        raise GuiderailError(f"{folder}: the head has {heads.shape[-1]} columns, the base {card['hidden_size']}")
    if tensors:  # layers that were trained too
        _, unexpected = decoder.load_state_dict(
            {key.removeprefix("model."): t for key, t in tensors.items()}, strict=False
        )
        if unexpected:
            raise GuiderailError(f"{folder}: unknown weights {', '.join(unexpected)}")
    longest = getattr(decoder.config.get_text_config(), "max_position_embeddings", None)
    return LoadedModel(decoder.to(device), heads, AutoTokenizer.from_pretrained(where), longest)
