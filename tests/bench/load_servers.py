"""The servers that benches put under load: `guiderail serve` and `vllm serve`, each in processes of its own."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from vllm_server import SERVE, running

CONTEXT = "1024"


class Server:
    """A server as seen from outside."""

    def __init__(self, process: psutil.Popen, url: str) -> None:
        self.process = process
        self.url = url

    def memory(self) -> dict[str, int]:
        """Bytes that the server and its processes hold for themselves, by process name."""
        held: dict[str, int] = {}
        for each in [self.process, *self.process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                held[each.name()] = held.get(each.name(), 0) + each.memory_full_info().uss
        return held

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        found = re.findall(rf"^guiderail:{name}(?:{{[^}}]*}})? (\S+)$", httpx.get(f"{self.url}/metrics").text, re.M)
        return sum(map(float, found))

    def outcomes(self) -> dict[str, float]:
        """Requests by outcome."""
        counts: dict[str, float] = {}
        text = httpx.get(f"{self.url}/metrics").text
        for outcome, value in re.findall(r'^guiderail:requests_total{.*outcome="(\w+)".*} (\S+)$', text, re.M):
            counts[outcome] = counts.get(outcome, 0) + float(value)
        return counts

    def kill_engine_after(self, seconds: float) -> None:
        """Kill the engine's core process later, as the kernel would if memory ran out."""

        def kill() -> None:
            time.sleep(seconds)
            for each in self.process.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "EngineCore" in " ".join(each.cmdline()) or "EngineCore" in each.name():
                        each.kill()
                        return

        threading.Thread(target=kill, daemon=True).start()


@contextmanager
def guiderail(folder: Path, *flags: str, context: str = CONTEXT) -> Iterator[Server]:
    """`guiderail serve` with the default model."""
    command = [str(Path(sys.executable).with_name("guiderail")), "serve", "--max-model-len", context, *flags]
    with running(command, folder / "guiderail.log", {}) as (process, url):
        yield Server(process, url)


@contextmanager
def vllm(folder: Path, dtype: str = "auto") -> Iterator[Server]:
    """`vllm serve` with the model, environment and engine settings of `guiderail serve`."""
    from guiderail.server.engines.vllm.engine_args import CPU_KV_GB
    from guiderail.server.engines.vllm.environment import prepare_environment
    from guiderail.server.models import catalogue
    from guiderail.server.models.cpu_features import auto_dtype
    from guiderail.server.settings import Settings

    settings = Settings()
    prepare_environment()
    dtype = auto_dtype() if dtype == "auto" else dtype
    command = [
        sys.executable, "-m", SERVE, "--model", catalogue.resolve(catalogue.DEFAULT_MODEL, settings.cache),
        "--host", "127.0.0.1", "--max-model-len", CONTEXT, "--dtype", dtype, "--block-size", "32",
        "--enforce-eager", "--max-num-seqs", str(settings.rows), "--generation-config", "vllm",
        "--kv-cache-memory-bytes", str(int(CPU_KV_GB * 2**30)), "--disable-log-stats",
    ]  # fmt: skip
    with running(command, folder / "vllm.log", {}) as (process, url):
        yield Server(process, url)
