"""Fingerprint of a model's weights without reading all of them: sizes and samples of its files, or a Hub commit."""

import hashlib
from pathlib import Path

SAMPLES, SAMPLE_BYTES = 16, 1 << 16
PATTERNS = ("*.safetensors", "*.json")


def fingerprint(model: str) -> str:
    """Return 16 hex digits for a folder, or a Hub id's commit in the local cache. Raises OSError if there is none."""
    folder = Path(model)
    if not folder.is_dir():
        from transformers.utils import cached_file

        config = cached_file(model, "config.json", local_files_only=True)
        return Path(str(config)).parent.name
    digest = hashlib.sha256()
    for path in sorted(path for pattern in PATTERNS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for i in range(SAMPLES):  # the first holds a safetensors file's header, the others weights
                file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
