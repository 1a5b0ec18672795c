"""Check of LoRA adapters before the engine is asked to load them."""

import json
import os

from guiderail.guides.core.errors import RequestError


def check_adapter(name: str, path: str, max_rank: int) -> None:
    """Raise RequestError unless `path` holds a LoRA adapter that vLLM can be asked to load."""
    config_file = os.path.join(path, "adapter_config.json")
    try:
        with open(config_file) as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise RequestError(f"LoRA adapter '{name}': cannot read {config_file}: {error}", name) from error
    if not os.path.exists(os.path.join(path, "adapter_model.safetensors")):
        raise RequestError(f"LoRA adapter '{name}': no adapter_model.safetensors in {path}", name)
    rank = config.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= max_rank:
        raise RequestError(f"LoRA adapter '{name}' has rank {rank}; --max-lora-rank allows 1 to {max_rank}", name)
