"""Tells a sequence classifier from a language model by the names of the weights in its checkpoint.

transformers and vLLM load either as a classifier, and give a language model a head of random numbers.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.models import catalogue

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


def require_head(path: str, where: str, what: str = "reward model") -> None:
    """Refuse a checkpoint whose weights have no head. path: the operator's word for it. where: its folder or Hub id.

    Raises GuiderailError. A Hub id's list of weights is fetched if it is not there; an embedded name needs no look.
    """
    if where in catalogue.EMBEDDED or not _has_head(_names(where)):
        raise GuiderailError(
            f"{what} {path}: a language model without a trained head (no weight 'score.weight') gives no rewards; "
            "`guiderail rewards train` trains one, and with reference=OTHER two language models are an implicit reward"
        )


def _has_head(names: Iterable[str]) -> bool:
    return any(f".{name}".endswith(".score.weight") for name in names)


def _names(where: str) -> list[str]:
    """Return the names of a checkpoint's weights. Raises OSError if there is none in safetensors."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    folder = Path(where)
    if folder.is_dir():
        index, files = folder / INDEX, sorted(folder.glob("*.safetensors"))
    else:
        found = cached_file(where, INDEX, _raise_exceptions_for_missing_entries=False)
        index = Path(found) if found is not None else Path(INDEX)
        files = [] if found is not None else [Path(cached_file(where, WHOLE))]
    if index.is_file():
        return list(json.loads(index.read_text())["weight_map"])
    names: list[str] = []
    for file in files:
        with safe_open(file, "numpy") as tensors:
            names += tensors.keys()
    return names
