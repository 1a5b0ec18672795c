"""The server's settings: flags, a YAML file and environment variables. The only reader of the environment,
but for the key of a remote reward model, which is read from the variable that its `key_env` names.

Precedence: command-line flag, then GUIDERAIL_* variable, then the YAML file given with --config.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.engines.policy_spec import RemotePolicySpec
from guiderail.server.models.catalogue import DEFAULT_MODEL
from guiderail.server.rewards.models.reward_spec import RewardModelSpec

ROWS = 128  # sequences decoded at once on CPU, as `vllm serve` does; on a GPU vLLM knows its own number


class SettingsError(GuiderailError):
    """A flag, variable or line of the configuration file is wrong."""


class OperatorLimits(BaseModel):
    """What no request may exceed. A request that asks for more is refused with the field's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_n: int = Field(64, ge=1, description="Answers per request (`n`).")
    max_tokens: int | None = Field(None, ge=1, description="Tokens per answer; default: the model's context.")
    max_candidates: int = Field(128, ge=1, description="Candidates per request, over all its answers.")
    max_queue: int = Field(256, ge=0, description="Requests that may wait for the engine.")
    max_queue_tokens: int = Field(262_144, ge=0, description="Tokens that waiting requests may ask for together.")
    reserved_share: float = Field(0.25, ge=0, lt=1, description="Share of rows kept for requests of one row.")
    min_priority: int = Field(0, ge=-100, le=100, description="Smallest `priority` (0 is normal, less is sooner).")
    max_deadline_s: float | None = Field(None, gt=0, description="Longest deadline; also the default one.")
    required_rewards: list[dict[str, Any]] = Field(
        default_factory=list, description="Rewards that a request may not turn off or change, as in `alignment`."
    )


class Settings(BaseSettings):
    """All settings of `guiderail serve`; `guiderail serve --help` explains them."""

    model_config = SettingsConfigDict(env_prefix="GUIDERAIL_", extra="forbid", frozen=True)

    model: str = DEFAULT_MODEL
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_key: Annotated[list[str], NoDecode] = []
    cache_dir: Path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "guiderail"
    chat_template: str | None = None

    dtype: str = "auto"
    max_model_len: int | None = Field(None, ge=64)
    kv_cache_gb: float | None = Field(None, gt=0)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    max_num_seqs: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=64)
    tensor_parallel_size: int = Field(1, ge=1)
    compile: bool = False
    enforce_eager: bool = False
    batch_invariant: bool = False
    lora: dict[str, str] = {}
    max_lora_rank: int = 16
    policy: dict[str, RemotePolicySpec] = {}

    guides: Annotated[list[str] | None, NoDecode] = None
    rewards: Annotated[list[str] | None, NoDecode] = None
    alignment: dict[str, Any] = {}
    profiles: dict[str, dict[str, Any]] = {}
    limits: OperatorLimits = OperatorLimits()
    reward: dict[str, RewardModelSpec] = {}
    calibration: Annotated[list[Path], NoDecode] = []
    encoder: str | None = None
    urial: dict[str, str] = {}
    drain_timeout_s: float = Field(10.0, ge=0)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings)

    @field_validator("api_key", "guides", "rewards", "calibration", mode="before")
    @classmethod
    def _comma_separated(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _compiles_or_not(self) -> Self:
        if self.compile and self.enforce_eager:
            raise ValueError("compile and enforce_eager exclude each other")
        return self

    @property
    def rows(self) -> int:
        """How many sequences the engine decodes at once."""
        return self.max_num_seqs or ROWS

    @property
    def model_name(self) -> str:
        """The name under which requests ask for the model: a folder's last part, anything else as it is."""
        folder = Path(self.model).expanduser()
        return self.served_model_name or (folder.resolve().name if folder.is_dir() else self.model)

    @property
    def cache(self) -> Path:
        """The cache folder, absolute."""
        return self.cache_dir.expanduser().absolute()


def load(flags: dict[str, Any], config: str | None) -> Settings:
    """Settings from given flags over environment over the YAML file. Raises SettingsError."""
    from_file: dict[str, Any] = {}
    if config is not None:
        try:
            from_file = yaml.safe_load(Path(config).expanduser().read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise SettingsError(f"--config {config}: {error}") from error
        if not isinstance(from_file, dict):
            raise SettingsError(f"--config {config}: expected a mapping of settings")
    variables = {name for name in Settings.model_fields if f"GUIDERAIL_{name.upper()}" in os.environ}
    merged = {name: value for name, value in from_file.items() if name not in variables} | flags
    try:
        return Settings(**merged)
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SettingsError("bad configuration: " + "; ".join(lines)) from error
