"""Options of a policy on another server: `--policy name=http://host:port[,option=value...]`, or YAML."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from guiderail.server.remote.remote_options import named_options, usable_url


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
