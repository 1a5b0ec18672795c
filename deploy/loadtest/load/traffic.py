"""Classes of traffic, each a share of the requests, from a YAML file.

classes:
  - name: plain
    share: 70
    max_tokens: 64
  - name: best_of_8
    share: 20
    alignment: {guide: {name: best_of_n, n: 8}, rewards: [sentiment]}
    goodput: {e2el: 8000}
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guiderail.loadtest.load.text_file import read_text
from guiderail.loadtest.loadtest_error import LoadtestError


class Objectives(BaseModel):
    """Latency limits of a good request, in milliseconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ttft: float | None = Field(None, ge=0)
    tpot: float | None = Field(None, ge=0)
    e2el: float | None = Field(None, ge=0)


class TrafficClass(BaseModel):
    """Requests of one kind. Fields that are None come from the command's flags."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field("default", min_length=1)
    share: float = Field(1.0, gt=0, description="weight relative to the other classes; weights need not sum to 1")
    endpoint: str | None = None
    model: str | None = None
    stream: bool = True
    max_tokens: int | None = Field(None, ge=1)
    alignment: dict[str, Any] | str | None = Field(None, description="the alignment object, or a profile's name")
    priority: int | None = None
    body: dict[str, Any] = Field({}, description="further fields of the request; over --extra-body")
    prompts: Path | None = Field(None, description="file of prompts, beside the YAML file unless absolute")
    goodput: Objectives | None = Field(None, description="in place of --goodput")
    cancellation_rate: float | None = Field(None, ge=0, le=1)


class Traffic(BaseModel):
    """The YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    classes: list[TrafficClass] = Field(min_length=1)


def load(path: Path) -> list[TrafficClass]:
    """The classes of a YAML file. Raises LoadtestError that names the field at fault."""
    try:
        content = yaml.safe_load(read_text(path, "--traffic"))
    except (yaml.YAMLError, RecursionError) as error:
        raise LoadtestError(f"--traffic {path}: {error}") from error
    if not isinstance(content, dict):
        raise LoadtestError(f"--traffic {path}: expected a mapping with the key 'classes'")
    try:
        classes = Traffic(**content).classes
    except ValidationError as error:
        first = error.errors()[0]
        loc = first["loc"]
        model = Objectives if "goodput" in loc else TrafficClass if "classes" in loc else Traffic
        hint = f" (known: {', '.join(model.model_fields)})" if first["type"] == "extra_forbidden" else ""
        raise LoadtestError(f"--traffic {path}: {_path(loc)}: {first['msg']}{hint}") from error
    for i, kind in enumerate(classes):
        if kind.name in {other.name for other in classes[:i]}:
            raise LoadtestError(f"--traffic {path}: classes[{i}].name: '{kind.name}' occurs twice")
    beside = path.absolute().parent
    return [k.model_copy(update={"prompts": beside / k.prompts}) if k.prompts else k for k in classes]


def _path(parts: tuple[int | str, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")
