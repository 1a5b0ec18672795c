"""Configurations of tiny decoders of the architectures that the packed runner is checked with."""

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "attention_dropout": 0.0,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=16),
    "gemma2 with soft-cap and window": Gemma2Config(**SMALL, sliding_window=16, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=16, query_pre_attn_scalar=16),
}
