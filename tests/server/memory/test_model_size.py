"""The memory that models need, told from configurations of real models and from headers of files, against the models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from guiderail.server.memory.model_size import header, shape, weight_bytes, width
from guiderail.server.rewards.models.packed_decoder import token_bytes

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    max_position_embeddings=131072,
)  # fmt: skip
LLAMA_2_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)
MISTRAL = MistralConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, sliding_window=4096
)
QWEN = Qwen2Config(
    hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32768
)
GEMMA = Gemma3TextConfig(
    hidden_size=1152,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    sliding_window=512,
)
DEEPSEEK = DeepseekV3Config(num_hidden_layers=61, kv_lora_rank=512, qk_rope_head_dim=64)
GPT2 = GPT2Config()


@pytest.mark.parametrize(
    ("config", "kv_token", "longest"),
    [
        (LLAMA_8B, 131_072, 131_072),
        (LLAMA_2_7B, 524_288, 4096),
        (MISTRAL, 131_072, 131_072),
        (QWEN, 28_672, 32_768),
        (GEMMA, 26_624, 131_072),
        (DEEPSEEK, 61 * 576 * 2, 4096),
        (GPT2, 12 * 2 * 768 * 2, 1024),
    ],
    ids=["llama 8B", "llama 2 7B", "mistral", "qwen 1.5B", "gemma 3 1B", "deepseek", "gpt2"],
)
def test_keys_and_values_of_a_token(config: Any, kv_token: int, longest: int) -> None:
    found = shape(config, 2)
    assert (found.kv_token, found.longest) == (kv_token, longest)
    assert shape(config, 4).kv_token == 2 * kv_token
    assert 20 * config.hidden_size <= found.work_token <= 1024 * config.hidden_size


def test_a_window_bounds_what_a_long_context_takes() -> None:
    mistral, gemma, llama = shape(MISTRAL, 2), shape(GEMMA, 2), shape(LLAMA_8B, 2)
    assert mistral.context(32_768) == 131_072 * 4096
    assert llama.context(32_768) == 131_072 * 32_768
    layers = [kind == "sliding_attention" for kind in GEMMA.layer_types]
    assert gemma.context(10_000) == sum(1024 * (512 if windowed else 10_000) for windowed in layers)
    assert mistral.context(100) == 131_072 * 100
    unused = Qwen2Config(**{**QWEN.to_dict(), "sliding_window": 4096, "use_sliding_window": False})
    assert shape(unused, 2).context(32_768) == 28_672 * 32_768


def test_layers_that_keep_a_state_take_nothing_of_a_context() -> None:
    """Told by the configuration, or not, and then vLLM is left to find out."""
    kinds = ["linear_attention", "linear_attention", "full_attention", "conv"]
    mixed = LlamaConfig(**{**LLAMA_8B.to_dict(), "num_hidden_layers": 4, "layer_types": kinds})
    assert shape(mixed, 2).context(1000) == 4096 * 1000
    jamba = JambaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    assert (shape(jamba, 2).context(1000) == 0) == (getattr(jamba, "layer_types", None) is None)
    assert shape(jamba, 2).context(262_144) <= 32 * 4096 * 262_144 // 8


def test_layers_of_different_sizes_and_layers_that_share_keys() -> None:
    """Gemma 3n: the last 15 of its 35 layers have no keys and values of their own, and four of five a window."""
    config = Gemma3nTextConfig()
    found = shape(config, 2)
    own = config.layer_types[: 35 - 15]
    layer = 2 * config.num_key_value_heads * config.head_dim * 2
    assert found.kv_token == layer * len(own)
    assert found.context(2000) == layer * sum(2000 if kind == "full_attention" else 512 for kind in own)


def test_chunks_bound_what_a_context_takes_as_windows_do() -> None:
    kinds = ["chunked_attention", "full_attention"]
    config = LlamaConfig(
        **{**LLAMA_8B.to_dict(), "num_hidden_layers": 2, "layer_types": kinds, "attention_chunk_size": 8192}
    )
    assert shape(config, 2).context(10_000) == 4096 * (8192 + 10_000)


def test_the_packed_pool_takes_as_much_a_token_as_was_planned() -> None:
    config = AutoConfig.for_model(
        "qwen2", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    for dtype, bytes_ in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert token_bytes(AutoModel.from_config(config, dtype=dtype)) == shape(config, bytes_).kv_token


@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_weights_as_they_are_loaded(dtype: str, size: int, tmp_path: Path) -> None:
    """Against the model itself, sharded or in one file, whatever the files hold, with and without its head."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    count = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("one", "shards"):
        assert weight_bytes(str(tmp_path / folder), dtype) == count * size
        assert weight_bytes(str(tmp_path / folder), dtype, head=False) == (count - 50 * 32) * size
    assert width(dtype) == size


def test_quantised_weights_count_as_they_are_stored(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4, 8, dtype=torch.int32), "scale": torch.zeros(3, dtype=torch.float16)}
    save_file(tensors | {"b": torch.zeros(5, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert weight_bytes(str(tmp_path), "auto") == 128 + 6 + 5
    assert {name: stored for name, *_, stored in header(tmp_path / "model.safetensors")} == {
        "a": 128,
        "scale": 6,
        "b": 5,
    }


def test_only_what_the_index_names_is_counted(tmp_path: Path) -> None:
    """Repositories keep older formats of the same weights beside the ones that are loaded."""
    for name in ("model-1", "consolidated"):
        save_file({name: torch.zeros(10)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model-1": "model-1.safetensors"}})
    )
    assert weight_bytes(str(tmp_path), "auto") == 20


def test_a_folder_without_safetensors_is_of_unknown_size(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 100)
    assert weight_bytes(str(tmp_path), "auto") == 0


def test_a_cached_hub_model_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one file, and in shards; not where one of them is missing."""
    import huggingface_hub

    held = {"model-1.safetensors": {"a": torch.zeros(10)}, "model-2.safetensors": {"b": torch.zeros(5)}}
    for name, tensors in (held | {"model.safetensors": {"c": torch.zeros(3)}}).items():
        save_file(tensors, tmp_path / name)

    def cached(model: str, name: str) -> str | None:
        assert model == "someone/model"
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    def hub(self: Any, model: str) -> Any:
        raise AssertionError("the cache has it all")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", hub)
    assert weight_bytes("someone/model", "auto") == 6
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_bytes("someone/model", "auto") == 30
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(AssertionError, match="the cache has it all"):
        weight_bytes("someone/model", "auto")


def test_one_that_is_not_cached_is_asked_for_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    tensor = TensorInfo(dtype="BF16", shape=[10, 20], data_offsets=(0, 400))
    files = {"model.safetensors": SafetensorsFileMetadata(metadata={}, tensors={"w": tensor})}
    repo = SafetensorsRepoMetadata(metadata=None, sharded=False, weight_map={}, files_metadata=files)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", lambda self, model: repo)
    assert weight_bytes("someone/model", "float32") == 800
