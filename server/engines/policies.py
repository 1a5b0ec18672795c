"""Policies that operators name beside the served model: LoRA adapters in folders, models on other servers.

`--lora NAME=FOLDER`, `--policy NAME=http://host:port[,option=value...]`, or YAML. Imports nothing heavy: settings do.
"""

import json
import os

from pydantic import BaseModel, ConfigDict, Field, field_validator

from guiderail.guides.core.errors import RequestError
from guiderail.server.remote.remote_options import named_options, usable_url


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


class RemotePolicySpec(BaseModel):
    """Options of one `--policy name=...`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="Base URL of a vLLM server of a model with the served model's tokenizer.")
    model: str | None = Field(None, min_length=1, description="Its name there; default: asked from the server.")
    key_env: str | None = Field(None, min_length=1, description="Environment variable that holds its API key.")

    @field_validator("url")
    @classmethod
    def _is_usable(cls, value: str) -> str:
        return usable_url(value)


def parse_flag(text: str) -> tuple[str, dict[str, str]]:
    """Split name=url[,key=value...]. Raises GuiderailError."""
    return named_options(text, "url", "--policy takes NAME=http://host:port[,model=...][,key_env=...]")
