"""Memory that a model needs, from its configuration and the headers of its weight files, before it is loaded."""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' types that are loaded in the model's dtype; others stay
WIDTH = {"float32": 4}  # bytes per number by dtype; all others that are served have 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Memory of a decoder in bytes, as its configuration implies it.

    kv_token: keys and values of one token in all layers. work_token: what one token of a forward pass takes besides
    (a rough upper bound: hidden states, the MLP's inner ones, queries, attention's float32 parts). longest: tokens.
    """

    kv_token: int
    work_token: int
    longest: int | None
    windows: tuple[tuple[int, int], ...] = ()  # layers that keep only some tokens: bytes of kv_token, tokens
    recurrent: bool = False  # some layers keep a state instead, the configuration does not say which

    def context(self, tokens: int) -> int:
        """Return the bytes of keys and values of one sequence of so many tokens, windows considered; 0 if unknown."""
        if self.recurrent:
            return 0
        return self.kv_token * tokens - sum(size * max(0, tokens - kept) for size, kept in self.windows)


def width(dtype: str) -> int:
    """Return the bytes per number of a model loaded in this dtype on a GPU, where "auto" is 16 bits."""
    return WIDTH.get(dtype, 2)


def shape(config: Any, width: int) -> Shape:
    """Return the shape of a transformers configuration. Raises AttributeError if it says too little."""
    text = config.get_text_config()
    layers, heads, hidden = text.num_hidden_layers, text.num_attention_heads, text.hidden_size
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    dim = getattr(text, "head_dim", None) or hidden // heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    inner = inner if isinstance(inner, int) else max(inner)  # one for each layer
    if latent := getattr(text, "kv_lora_rank", None):  # latent attention keeps one short vector for all heads
        layer = (latent + text.qk_rope_head_dim) * width
    else:
        layer = 2 * kv_heads * dim * width
    kept = {
        "sliding_attention": getattr(text, "sliding_window", None)
        if getattr(text, "use_sliding_window", True)
        else None,
        "chunked_attention": getattr(text, "attention_chunk_size", None),
    }
    kinds = getattr(text, "layer_types", None)
    recurrent = kinds is None and any("mamba" in key for key in text.to_dict())
    kinds = kinds or ["sliding_attention" if kept["sliding_attention"] else "full_attention"] * layers
    kinds = kinds[: layers - (getattr(text, "num_kv_shared_layers", None) or 0)]
    kinds = [kind for kind in kinds if "attention" in kind and kind != "linear_attention"]  # others keep a state
    work = (6 * hidden + 3 * inner + 2 * (heads + 2 * kv_heads) * dim) * width + 3 * heads * (dim + 2) * 4
    return Shape(
        layer * len(kinds),
        work,
        getattr(text, "max_position_embeddings", None),
        tuple((layer, size) for kind in kinds if (size := kept.get(kind))),
        recurrent,
    )


def read_shape(where: str, dtype: str) -> Shape | None:
    """Return the shape of a model in a folder or on the Hub, in this dtype; None if transformers does not know it."""
    from transformers import AutoConfig

    try:
        return shape(AutoConfig.from_pretrained(where), width(dtype))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def weight_bytes(where: str, dtype: str, *, head: bool = True) -> int:
    """Return the bytes of a model's weights once loaded in this dtype; `head=False` leaves out a language model's head.

    where: a folder or Hub id; of the latter only headers are read, from the Hub unless the weights are in the local
    cache. Returns 0 where there are no safetensors. Raises OSError if the Hub cannot be reached.
    """
    size = width(dtype)
    return sum(
        prod(shape) * size if kind in FLOATS else stored
        for name, kind, shape, stored in _tensors(where)
        if head or not name.startswith("lm_head.")
    )


def _tensors(where: str) -> list[tuple[str, str, list[int], int]]:
    """Return name, type, shape and stored bytes of every tensor."""
    files = _in_folder(Path(where)) if Path(where).is_dir() else _in_cache(where)
    return _on_the_hub(where) if files is None else [found for path in files for found in header(path)]


def _in_folder(folder: Path) -> list[Path]:
    """Return the safetensors files of a model: those that its index names, where it has one."""
    index = folder / "model.safetensors.index.json"
    return [folder / name for name in _shards(index)] if index.is_file() else sorted(folder.glob("*.safetensors"))


def _shards(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def _in_cache(model: str) -> list[Path] | None:
    """Return the same of a Hub model, if the local cache has them all."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(model, "model.safetensors.index.json")
    names = _shards(Path(index)) if isinstance(index, str) else ["model.safetensors"]
    found = [try_to_load_from_cache(model, name) for name in names]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths if len(paths) == len(names) else None


def header(path: Path) -> list[tuple[str, str, list[int], int]]:
    """Return the tensors of one safetensors file: eight bytes of length, then JSON (the format's specification)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    return [
        (name, entry["dtype"], entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    ]


def _on_the_hub(model: str) -> list[tuple[str, str, list[int], int]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        files = HfApi().get_safetensors_metadata(model).files_metadata
    except NotASafetensorsRepoError:
        return []
    return [
        (name, tensor.dtype, tensor.shape, tensor.data_offsets[1] - tensor.data_offsets[0])
        for file in files.values()
        for name, tensor in file.tensors.items()
    ]
