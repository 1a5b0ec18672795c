"""`guiderail serve` as a process of its own, with all that descends from it."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

COMMAND = [str(Path(sys.executable).with_name("guiderail")), "serve", "--max-model-len", "512", "--kv-cache-gb", "0.25"]

START_S = 600.0  # longer than any start takes, on a machine that is busy with ten other things: it hangs


def free_port() -> int:
    """A port that nothing is given by chance until its server has it: one below those that Linux hands out itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Serve:
    """A server process of ours and everything that descends from it."""

    def __init__(self, log: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log = log
        self._seen: dict[int, psutil.Process] = {}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*COMMAND, "--port", str(port), *flags], stdout=file, stderr=file, env=self.environment(env or {})
            )

    @staticmethod
    def environment(more: Mapping[str, str]) -> dict[str, str]:
        """The present environment with `more`, whose PYTHONPATH comes before the present one."""
        folders = [more.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
        path = {"PYTHONPATH": os.pathsep.join(filter(None, folders))} if any(folders) else {}
        return {**os.environ, **more, **path}

    def family(self) -> list[psutil.Process]:
        """Living processes that are or were descendants."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen[child.pid] = child
        return [p for p in self._seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def engines(self) -> list[psutil.Process]:
        """Living processes of engines; of others that end meanwhile nothing is known."""
        found = []
        for each in self.family():
            with suppress(psutil.NoSuchProcess):
                if "EngineCore" in "".join(each.cmdline()):
                    found.append(each)
        return found

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            self.family()
            time.sleep(0.1)

    def ready(self) -> int:
        """The status of /ready; 0 if nobody answers."""
        try:
            return httpx.get(f"{self.url}/ready", timeout=2).status_code
        except httpx.TransportError:
            return 0

    def end(self, number: int, seconds: float = 30) -> int:
        """Sends the signal; returns the exit status once the process and its whole family are gone."""
        self.family()
        self.process.send_signal(number)
        status = self.process.wait(seconds)
        _, alive = psutil.wait_procs(self.family(), timeout=5)
        assert not alive, f"left behind: {alive}"
        return status

    def kill(self) -> None:
        for each in self.family():
            each.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
