"""Tiny models with a tokenizer and chat template of their own, as files: a base with a reward head, language models."""

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
WORDS = [f"w{i}" for i in range(80)]


def tiny_head(folder: Path, *, heads: int = 2, positions: int = 96, **card: Any) -> str:
    """Writes base and head under `folder` and returns the head's path; `card` goes into reward.json."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaModel

    base = folder / "base"
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=positions,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaModel(config)
    for parameter in model.parameters():  # the usual initialisation hardly tells inputs apart
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    head = folder / "head"
    head.mkdir()
    save_file({"score.weight": torch.randn(heads, 48)}, head / "head.safetensors")
    about = {"format": "guiderail-reward-head", "version": 1, "base": str(base), "hidden_size": 48, **card}
    (head / "reward.json").write_text(json.dumps(about))
    return str(head)


def tiny_policy(folder: Path, name: str, *, seed: int = 0, kind: Any = None, config: Any = None, **sizes: Any) -> str:
    """Writes a language model (a `kind` of transformers, by default a Llama's) and returns its path."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 96,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = (kind or LlamaForCausalLM)((config or LlamaConfig)(**shape | sizes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def tiny_tokenizer() -> Any:
    """One token a word; unknown words share one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "user", "assistant", "system", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=TEMPLATE)
