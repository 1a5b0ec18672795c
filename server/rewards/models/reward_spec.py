"""The operator's words on a reward model: `--reward name=path[,option=value...]` or YAML. Imports nothing heavy."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from guiderail.server.remote.remote_options import named_options, usable_url


class RewardModelSpec(BaseModel):
    """One `--reward name=...`: the place of a model and the options that it is run with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    reference: str | None = Field(
        None,
        min_length=1,
        description="A causal language model: the reward is then the answer's log-likelihood ratio under `path`, the "
        "policy, and it (DPO's implicit reward). Both have one tokenizer and run here, side by side.",
    )
    backend: str = Field("packed", pattern="^(packed|vllm)$")
    head: int = Field(0, ge=0)
    dtype: str = Field("auto", pattern="^(auto|float32|float16|bfloat16)$")
    kv_gb: float | None = Field(
        None,
        gt=0,
        description="Memory for keys and values, GiB; default: for a text as long as the model reads, and a pass.",
    )
    device: str | None = Field(
        None,
        pattern=r"^(cpu|cuda|cuda:(0|[1-9]\d*))$",
        description="Where it runs; default: on a GPU that is not the engine's.",
    )
    url: str | None = Field(
        None,
        description="vLLM pooling servers that run the model instead of an engine here, separated by '|'. "
        "`path` then names the tokenizer and chat template alone.",
    )
    model: str | None = Field(None, min_length=1, description="Its name on those servers; default: asked from them.")
    key_env: str | None = Field(None, min_length=1, description="Environment variable that holds their API key.")

    @property
    def urls(self) -> tuple[str, ...]:
        """Base URLs of the remote servers, without a slash at the end."""
        return tuple(self.url.split("|")) if self.url is not None else ()

    @field_validator("url")
    @classmethod
    def _is_usable(cls, value: str | None) -> str | None:
        return "|".join(map(usable_url, value.split("|"))) if value is not None else None

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.reference is not None:
            allowed, why = (
                {"path", "reference", "backend", "dtype", "kv_gb", "device"},
                "does not go with reference",
            )
            if self.backend != "packed":
                raise ValueError("reference needs backend=packed")
            if self.reference == self.path:
                raise ValueError("policy and reference are the same, so the ratio is always 0")
        elif self.url is None:
            allowed, why = (
                {"path", "backend", "head", "dtype", "kv_gb", "device"},
                "is for a remote server and needs url",
            )
        else:
            allowed, why = {"path", "backend", "head", "url", "model", "key_env"}, "is the remote server's own option"
            if self.backend != "vllm":
                raise ValueError("url needs backend=vllm")
        for name in sorted(self.model_fields_set - allowed):
            raise ValueError(f"{name} {why}")
        return self


def parse_flag(text: str) -> tuple[str, dict[str, str]]:
    """Split name=path[,key=value...]. Raises GuiderailError."""
    usage = (
        "--reward takes NAME=PATH[,backend=packed|vllm][,head=0][,dtype=auto][,device=cuda:1][,url=http://...] "
        "or NAME=POLICY,reference=REFERENCE[,dtype=auto][,device=cuda:1]"
    )
    return named_options(text, "path", usage)
