"""The server's settings, each in one place: name, type, default, bounds and help. Flags (serve_flags.py), GUIDERAIL_*
variables and the YAML file given with --config are derived from them, and precede each other in this order.

The only reader of the environment, but for the key of a remote server, which is read from the variable that its
`key_env` names.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.engines import policies
from guiderail.server.engines.policies import RemotePolicySpec
from guiderail.server.models.catalogue import DEFAULT_MODEL
from guiderail.server.rewards.models import reward_spec
from guiderail.server.rewards.models.reward_spec import RewardModelSpec

ROWS = 128  # sequences decoded at once on CPU, as `vllm serve` does; on a GPU vLLM knows its own number


class SettingsError(GuiderailError):
    """A flag, variable or line of the configuration file is wrong."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """Marks a field whose flag may be repeated. read: makes a name and its options of an item, or raises
    GuiderailError; for a field that maps names to strings none is needed.
    """

    metavar: str | None = None
    read: Callable[[str], tuple[str, object]] | None = None


class OperatorLimits(BaseModel):
    """Limits that no request may exceed. A request that asks for more is refused with the field's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_n: int = Field(64, ge=1, description="Answers per request (`n`).")
    max_tokens: int | None = Field(None, ge=1, description="Tokens per answer; default: the model's context.")
    max_candidates: int = Field(128, ge=1, description="Candidates per request, over all its answers.")
    max_queue: int = Field(256, ge=0, description="Requests that may wait for the engine.")
    max_queue_tokens: int = Field(262_144, ge=0, description="Tokens that waiting requests may ask for together.")
    reserved_share: float = Field(0.25, ge=0, lt=1, description="Share of rows kept for requests of one row.")
    newcomer_share: float = Field(
        0.05, ge=0, lt=1, description="Share of rows kept for clients (API keys, else addresses) of which nothing runs."
    )
    max_client_requests: int | None = Field(None, ge=1, description="Requests of one client, running and waiting.")
    max_client_tokens: int | None = Field(None, ge=1, description="Tokens that those may ask for together.")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="Bytes of a request's body.")
    max_body_values: int = Field(1_500_000, ge=1000, description="Commas and opening brackets in a body.")
    max_messages: int = Field(8192, ge=1, description="Messages, and parts of their contents, of a request.")
    max_rewards: int = Field(64, ge=1, description="Rewards of a request.")
    max_answers: int = Field(16_384, ge=1, description="Answers of a request for scores, over all its inputs.")
    max_answer_chars: int = Field(1_000_000, ge=1, description="Characters of an answer to score.")
    max_biased_tokens: int = Field(1024, ge=1, description="Entries of `logit_bias`, and of `stop_token_ids`.")
    max_alignment_values: int = Field(20_000, ge=100, description="Values in `alignment`, or in a score's `rewards`.")
    min_priority: int = Field(0, ge=-100, le=100, description="Smallest `priority` (0 is normal, less is sooner).")
    max_deadline_s: float | None = Field(None, gt=0, description="Longest deadline; also the default one.")
    required_rewards: list[dict[str, JsonValue]] = Field(
        default_factory=list, description="Rewards that a request may not turn off or change, as in `alignment`."
    )


class Settings(BaseSettings):
    """All settings of `guiderail serve`. A field with a description has a flag."""

    model_config = SettingsConfigDict(env_prefix="GUIDERAIL_", extra="forbid", frozen=True)

    model: str = Field(DEFAULT_MODEL, description="embedded name (see `guiderail models`), local folder or Hub id")
    served_model_name: str | None = Field(None, description="name that requests use; default: the model's own")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    api_key: Annotated[list[str], NoDecode, Repeated()] = Field(
        [], description="require this bearer key (process lists show it: see --api-key-file)"
    )
    api_key_file: Path | None = Field(None, description="file of keys, lines `name: key`; read again on SIGHUP")
    allowed_origin: Annotated[list[str], NoDecode, Repeated("ORIGIN")] = Field(
        [], description="let pages of this origin ask from browsers, as https://host[:port], or * for all"
    )
    header_timeout_s: float = Field(20.0, gt=0, description="seconds in which a request's headers must arrive")
    body_timeout_s: float = Field(60.0, gt=0, description="seconds in which a request's body must arrive")
    idle_timeout_s: float = Field(75.0, gt=0, description="seconds that a connection may wait for its next request")
    write_timeout_s: float = Field(30.0, gt=0, description="seconds that a client may leave its answer unread")
    max_connections: int = Field(1000, ge=1, description="connections open at once")
    cache_dir: Path = Field(
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "guiderail",
        description="folder for converted models (~/.cache/guiderail)",
    )
    chat_template: str | None = Field(None, description="Jinja chat template, or the path of one")
    allow_control_tokens: bool = Field(
        False, description="let control tokens in messages end and begin turns, as vllm serve does"
    )
    plain_completions: bool = Field(False, description="read control tokens in the prompts of text completions as text")

    dtype: str = Field(
        "auto", description="float32, float16, bfloat16, or auto: on CPU what its instruction set is fast in"
    )
    max_model_len: int | None = Field(None, ge=64, description="context length in tokens")
    kv_cache_gb: float | None = Field(
        None, gt=0, description="memory for KV pages, GiB (on CPU 2, on each GPU what is left)"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of GPU memory for engine and rewards together"
    )
    max_num_seqs: int | None = Field(
        None, ge=1, description=f"sequences decoded at once (on CPU {ROWS}, on a GPU as vllm serve)"
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=64, description="tokens of one step of the engine (as vllm serve)"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs to shard the model over")
    compile: bool = Field(False, description="compile the model on CPU (slow start)")
    enforce_eager: bool = Field(False, description="no CUDA graphs and no compilation on a GPU (slower, less memory)")
    batch_invariant: bool = Field(
        False,
        description="no answer depends on what runs beside it (on CPU: float32); README says what a seed promises",
    )
    lora: Annotated[dict[str, str], Repeated("NAME=PATH")] = Field({}, description="serve a LoRA adapter")
    max_lora_rank: int = Field(16, description="largest rank of an adapter")
    policy: Annotated[dict[str, RemotePolicySpec], Repeated("NAME=URL[,KEY=VALUE]", policies.parse_flag)] = Field(
        {}, description="a policy on another vLLM server, as a guide's baseline (keys: model, key_env)"
    )

    guides: Annotated[list[str] | None, NoDecode] = Field(None, description="load only these guides")
    rewards: Annotated[list[str] | None, NoDecode] = Field(None, description="load only these rewards")
    reward: Annotated[dict[str, RewardModelSpec], Repeated("NAME=PATH[,KEY=VALUE]", reward_spec.parse_flag)] = Field(
        {},
        description="serve a reward model (folder, Hub id or bundled head); keys: backend, head, dtype, kv_gb, device; "
        "two language models: PATH,reference=PATH; "
        "on remote vLLM pooling servers: backend=vllm, url=http://host:port[|...], model, key_env",
    )
    calibration: Annotated[list[Path], NoDecode, Repeated("FILE")] = Field(
        [], description="stored calibration of a reward (guiderail rewards calibrate)"
    )
    encoder: str | None = Field(
        None, description="sentence encoder for mbr selection: folder or Hub id (the embedded all-MiniLM-L6-v2)"
    )
    urial: Annotated[dict[str, str], Repeated("NAME=FILE.md")] = Field({}, description="a style for prompter urial")
    debug: bool = Field(False, description="say where in its code a guide or reward failed, to clients too")
    strict_fields: bool = Field(
        False, description="refuse a request with fields that nobody knows (they are ignored, with a warning)"
    )
    drain_timeout_s: float = Field(10.0, ge=0, description="seconds that requests in flight get at shutdown")

    alignment: dict[str, JsonValue] = {}
    profiles: dict[str, dict[str, JsonValue]] = {}
    limits: OperatorLimits = OperatorLimits()

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

    @field_validator("allowed_origin")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        for each in value:
            if each not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", each):
                raise ValueError(f"'{each}' is no origin: write scheme://host[:port], or *")
        return value

    @field_validator("api_key", "allowed_origin", "guides", "rewards", "calibration", mode="before")
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _compiles_or_not(self) -> Self:
        if self.compile and self.enforce_eager:
            raise ValueError("compile and enforce_eager exclude each other")
        return self

    @property
    def rows(self) -> int:
        """Number of sequences that the engine decodes at once."""
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


def load(flags: Mapping[str, object], config: str | None) -> Settings:
    """Return the settings of given flags over the environment over the YAML file. Raises SettingsError."""
    from_file: dict[str, object] = {}
    if config is not None:
        try:
            from_file = yaml.safe_load(Path(config).expanduser().read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise SettingsError(f"--config {config}: {error}") from error
        if not isinstance(from_file, dict):
            raise SettingsError(f"--config {config}: expected a mapping of settings")
    variables = {name for name in Settings.model_fields if f"GUIDERAIL_{name.upper()}" in os.environ}
    merged = {name: value for name, value in from_file.items() if name not in variables}
    try:
        return Settings(**{**merged, **flags})  # type: ignore[arg-type]
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SettingsError("bad configuration: " + "; ".join(lines)) from error
