"""What the operator says of a reward model: `--reward name=path[,option=value...]` or YAML. Imports nothing heavy."""

from pydantic import BaseModel, ConfigDict, Field

from guiderail.guides.errors import GuiderailError


class RewardModelSpec(BaseModel):
    """One `--reward name=...`: where the model is and how it is run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    backend: str = Field("packed", pattern="^(packed|vllm)$")
    head: int = Field(0, ge=0)
    dtype: str = Field("auto", pattern="^(auto|float32|float16|bfloat16)$")
    kv_gb: float = Field(0.5, gt=0, description="Memory for keys and values of prefixes, GiB.")


def parse_flag(text: str) -> tuple[str, dict[str, str]]:
    """Splits name=path[,key=value...]. Raises GuiderailError."""
    name, equals, rest = text.partition("=")
    path, *options = rest.split(",")
    pairs = [option.partition("=") for option in options]
    if not (name and equals and path and all(key and value for key, _, value in pairs)):
        raise GuiderailError(f"--reward takes NAME=PATH[,backend=packed|vllm][,head=0][,dtype=auto]; got '{text}'")
    return name, {"path": path, **{key: value for key, _, value in pairs}}
