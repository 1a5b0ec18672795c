"""Conversion of a GGUF file to a folder of safetensors that vLLM loads: dequantised once, to bfloat16.

transformers dequantises; what its GGUF path leaves wrong for our purposes is fixed here (see `convert_gguf`).
"""

import json
from pathlib import Path
from typing import Any


def convert_gguf(source: Path, target: Path, *, add_bos: bool) -> None:
    """Write config, tokenizer and weights of the GGUF file `source` into the existing folder `target`.

    add_bos: make the tokenizer prepend its BOS token, where the GGUF says so and the converted tokenizer forgets it
    (Gemma: without it the model talks nonsense). Raises ValueError if the tokenizer prepends other than one BOS.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if add_bos:
        _prepend_bos(tokenizer)
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # save_pretrained refuses a model that was read from GGUF; its parts can be saved one by one.
    state = model.state_dict()
    if model.config.get_text_config().tie_word_embeddings:
        state.pop("lm_head.weight", None)
    weights = {key: value.to(torch.bfloat16).contiguous() for key, value in state.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    if "quantization_config" in config:
        raise ValueError("the converted config still says that the weights are quantised")


def _prepend_bos(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    ids = tokenizer("text")["input_ids"]
    if ids[0] != tokenizer.bos_token_id or ids.count(tokenizer.bos_token_id) != 1:
        raise ValueError(f"expected one {bos} in front of the converted tokenizer's output, got {ids[:3]}")
