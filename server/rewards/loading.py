"""Loads reward models: a Hugging Face sequence classifier (folder or Hub id) or a Guiderail reward head.

A reward head is a folder with reward.json and head.safetensors, as `guiderail rewards train` writes it: a
small head on top of a base model. Weights are read from safetensors only, never from pickles.
"""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guiderail.guides.errors import GuiderailError
from guiderail.server import models
from guiderail.server.rewards.neural import Backend, NeuralReward, PackedBackend, scoring_thread
from guiderail.server.rewards.spec import RewardModelSpec

BUNDLED = {path.name: path for path in sorted((Path(__file__).parent / "heads").glob("*")) if path.is_dir()}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder without its head, the head's weight [K, H] (float32) and the tokenizer."""

    decoder: Any
    heads: Any
    tokenizer: Any
    longest: int | None


def neural_reward(spec: RewardModelSpec, cache: Path, say: Callable[[str], None]) -> NeuralReward:
    """The reward of a spec; the model is loaded when it starts."""

    def packed() -> tuple[Backend, Any, int | None]:
        model = load_model(spec.path, cache, spec.dtype, say)
        from guiderail.server.rewards.packed import PackedRunner, capacity

        runner = PackedRunner(model.decoder, model.heads, capacity=capacity(model.decoder, spec.kv_gb))
        return PackedBackend(runner, len(model.heads)), model.tokenizer, model.longest

    async def load() -> tuple[Backend, Any, int | None]:
        if spec.backend == "packed":
            return await asyncio.get_running_loop().run_in_executor(scoring_thread(), packed)
        from transformers import AutoTokenizer

        from guiderail.server.engines.vllm import EngineSettings
        from guiderail.server.engines.vllm_pooling import build_pooling

        loop = asyncio.get_running_loop()
        folder = await loop.run_in_executor(scoring_thread(), classifier_folder, spec.path, cache, say)
        pooler = await build_pooling(EngineSettings(model=folder, dtype=spec.dtype, kv_cache_gb=spec.kv_gb))
        return pooler, AutoTokenizer.from_pretrained(folder), pooler.longest

    return NeuralReward(load, spec.head, at_end_of_turn=_is_head(head_folder(spec.path)))


def classifier_folder(path: str, cache: Path, say: Callable[[str], None] = lambda text: None) -> str:
    """A folder or Hub id that vLLM loads as a sequence classifier; a reward head is joined to its base, once."""
    folder = head_folder(path)
    if not _is_head(folder):
        return models.resolve(path, cache, say)
    card = json.loads((folder / "reward.json").read_text())
    digest = models.file_sha256(folder / "head.safetensors")[:12]
    target = cache / "rewards" / f"{folder.name}-{digest}"
    if not target.exists():
        model = load_model(path, cache, "bfloat16", say)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            made = Path(name) / "model"
            write_classifier(model, Path(models.resolve(card["base"], cache, say)), made)
            made.rename(target)
    return str(target)


def write_classifier(model: LoadedModel, base: Path, target: Path) -> None:
    """Writes decoder, heads and tokenizer as a Hugging Face sequence classifier into a new folder."""
    from safetensors.torch import save_file

    target.mkdir()
    weights = {f"model.{key}": value.contiguous().cpu() for key, value in model.decoder.state_dict().items()}
    weights["score.weight"] = model.heads.to(next(iter(weights.values())).dtype).contiguous()
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
    """Where a reward head of this name or path would be."""
    return BUNDLED.get(path, Path(path).expanduser())


def _is_head(folder: Path) -> bool:
    return (folder / "reward.json").is_file()


def load_model(
    path: str, cache: Path, dtype: str = "auto", say: Callable[[str], None] = lambda text: None
) -> LoadedModel:
    """Loads a reward model onto the GPU if there is one, else the CPU. Raises GuiderailError."""
    import torch
    from transformers import AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    folder = head_folder(path)
    if _is_head(folder):
        return _load_head(folder, cache, kind, device, say)
    from transformers import AutoModelForSequenceClassification

    where = models.resolve(path, cache, say)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(where, dtype=kind, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise GuiderailError(f"reward model {path} does not load: {error}") from error
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise GuiderailError(f"reward model {path}: {type(model).__name__} has no linear head named 'score'")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    decoder = model.base_model.to(device)
    return LoadedModel(decoder, head.weight.detach().float(), AutoTokenizer.from_pretrained(where), longest)


def _load_head(folder: Path, cache: Path, kind: Any, device: str, say: Callable[[str], None]) -> LoadedModel:
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    card = json.loads((folder / "reward.json").read_text())
    if card.get("format") != "guiderail-reward-head" or card.get("version") != 1:
        raise GuiderailError(f"{folder}/reward.json is not a reward head of version 1")
    base = card["base"]
    embedded = models.EMBEDDED.get(base)
    if embedded is not None and card.get("base_revision") not in (None, embedded.sha256):
        raise GuiderailError(f"{folder} was trained on another revision of {base}")
    where = models.resolve(base, cache, say)
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
