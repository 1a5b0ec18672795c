"""`guiderail serve` as a process: start, engine loss and return, SIGTERM, Ctrl-C, and nothing left behind."""

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from serve_process import START_S, Serve


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    servers: list[Serve] = []

    def start(*flags: str, env: dict[str, str] | None = None) -> Serve:
        servers.append(Serve(tmp_path / f"{len(servers)}.log", *flags, env=env))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


SOUR = 13  # max_tokens of a request that the engine of `sour_engine` dies of


def plugin(folder: Path, group: str, code: str) -> str:
    """A folder for PYTHONPATH with an installed distribution `sour`, whose entry point `sour` is sour:entry."""
    folder.mkdir(exist_ok=True)
    (folder / "sour.py").write_text(code)
    info = folder / "sour-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sour\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nsour = sour:entry\n")
    return str(folder)


def sour_engine(folder: Path) -> str:
    """A plugin of vLLM that raises in the engine's process once it is to schedule a request of SOUR tokens."""
    return plugin(
        folder / "plugin",
        "vllm.general_plugins",
        f"""
def entry():
    from guiderail.server.engines.vllm.scheduling.scheduler import GroupScheduler
    plain = GroupScheduler.schedule
    def schedule(self, *args, **options):
        if any(request.max_tokens == {SOUR} for request in self.requests.values()):
            raise RuntimeError("sour milk")
        return plain(self, *args, **options)
    GroupScheduler.schedule = schedule
""",
    )


def pinned(process: psutil.Process) -> list[tuple[int, str]]:
    """The CPUs to which threads of a process are held that may run on one alone, each with its thread's name."""
    found = []
    for thread in process.threads():
        with suppress(ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
            if len(on := os.sched_getaffinity(thread.id)) == 1:
                found.append((*on, Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text().strip()))
    return sorted(found)


def huge_bytes(process: psutil.Process) -> int:
    """Memory of a process in huge pages."""
    (found,) = re.findall(r"AnonHugePages: *(\d+)", Path(f"/proc/{process.pid}/smaps_rollup").read_text())
    return int(found) * 1024


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_survives_its_engine_and_leaves_nothing_on_sigterm(
    started: Callable[..., Serve], model_path: str, tmp_path: Path
) -> None:
    # scikit-learn sets the second one in every process that imports it, such as that of other tests.
    server = started(env={"PYTHONPATH": sour_engine(tmp_path), "KMP_INIT_AT_FORK": "FALSE"})
    server.wait(lambda: server.ready() == 200, START_S)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).status_code == 200

    refused = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"max_tokens": SOUR}, timeout=120)
    assert refused.status_code == 503
    assert "the engine process died: RuntimeError: sour milk; " in refused.json()["error"]["message"]
    server.wait(lambda: "the engine died: RuntimeError: sour milk; starting it again" in server.log.read_text(), 60)
    server.wait(lambda: server.ready() == 200, START_S)

    (core,) = server.engines()
    assert not [p for p in server.family() if "Worker" in "".join(p.cmdline())], "the model is in the scheduler's"
    # OpenMP has a thread for each CPU, and nothing else is pinned.
    held = pinned(core)
    assert [cpu for cpu, _ in held] == sorted(os.sched_getaffinity(0)), held
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        # The KV cache at least; where memory is in pieces Linux gives them later.
        server.wait(lambda: huge_bytes(core) > 0.25 * 2**30, 300)
    core.kill()
    server.wait(lambda: server.ready() == 503, 60)
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    server.wait(lambda: "the engine died: killed by SIGKILL (out of memory?)" in server.log.read_text(), 60)
    server.wait(lambda: server.ready() == 200, START_S)
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).status_code == 200
    assert "guiderail:engine_restarts_total" in (metrics := httpx.get(f"{server.url}/metrics").text)
    assert 'engine_restarts_total{model_name="smollm2-135m-instruct"} 2.0' in metrics

    assert server.end(signal.SIGTERM) == 0
    assert "stopped" in server.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_server_takes_its_engines_with_it(
    started: Callable[..., Serve], model_path: str, reward_head: str
) -> None:
    server = started("--reward", f"head={reward_head},backend=vllm")
    server.wait(lambda: server.ready() == 200, START_S)
    family = server.family()
    assert sum("EngineCore" in "".join(p.cmdline()) for p in family) == 2
    server.process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("far", ["preparing", "engine"])
def test_a_signal_while_starting_leaves_nothing(
    started: Callable[..., Serve], model_path: str, number: int, far: str
) -> None:
    server = started()
    server.wait(
        lambda: "preparing" in server.log.read_text() and (far == "preparing" or bool(server.engines())), START_S
    )
    assert server.end(number) == 130
    assert "stopped while starting" in server.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_signal_does_not_wait(started: Callable[..., Serve], model_path: str) -> None:
    server = started("--drain-timeout-s", "3600")
    server.wait(lambda: server.ready() == 200, START_S)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()  # kept: one that is given up closes the connection
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.wait(lambda: server.ready() == 503, 60)
        assert server.end(signal.SIGTERM) == 130
    assert server.log.read_text().endswith("guiderail: stopped at once\n")


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_an_engine_that_dies_while_starting_says_why(
    started: Callable[..., Serve], model_path: str, tmp_path: Path
) -> None:
    server = started()
    cores: list[psutil.Process] = []
    while not cores and server.process.poll() is None:
        cores = server.engines()
    cores[0].kill()
    assert server.process.wait(START_S) == 1
    assert server.log.read_text().strip().splitlines()[-1] == (
        f"guiderail: vLLM does not start with {model_path}: killed by SIGKILL (out of memory?)"
    )

    broken = tmp_path / "broken"
    shutil.copytree(model_path, broken)
    with (broken / "model.safetensors").open("r+b") as weights:
        weights.truncate(2**20)  # its header is whole, so that the engine alone finds out
    server = started("--model", str(broken))
    assert server.process.wait(START_S) == 1
    said = server.log.read_text()
    assert said.strip().splitlines()[-1].startswith(f"guiderail: vLLM does not start with {broken}: ")
    assert "SafetensorError" in said.strip().splitlines()[-1]
    assert "Traceback" in said, "the log has all"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nope"], "not an embedded model (smollm2-135m-instruct, gemma3-270m)"),
        (["--rewards", "length,nope"], "no entry point 'nope'"),
        (["--lora", "a=/nowhere"], "LoRA adapter 'a': cannot read"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_a_start_that_cannot_work_says_why_in_one_line(
    started: Callable[..., Serve], model_path: str, flags: list[str], message: str
) -> None:
    server = started(*flags)
    assert server.process.wait(START_S) == 1
    last = server.log.read_text().strip().splitlines()[-1]
    assert last.startswith("guiderail: ")
    assert message in last


def test_a_port_in_use_is_told_before_the_engine_starts(started: Callable[..., Serve]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = started("--port", str(port))
        assert server.process.wait(START_S) == 1
    said = server.log.read_text().strip().splitlines()
    assert said == [
        f"guiderail: cannot listen on http://127.0.0.1:{port}: Address already in use; choose with --host and --port"
    ]


def test_a_broken_plugin_stops_the_start(started: Callable[..., Serve], model_path: str, tmp_path: Path) -> None:
    folder = plugin(tmp_path / "plugin", "guiderail.guides", "raise RuntimeError('sour milk')")
    server = started(env={"PYTHONPATH": folder})
    assert server.process.wait(START_S) == 1
    assert "'sour'" in server.log.read_text()
    assert "sour milk" in server.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_tells_what_it_cuts_off(started: Callable[..., Serve], model_path: str) -> None:
    server = started("--drain-timeout-s", "1")
    server.wait(lambda: server.ready() == 200, START_S)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400, "ignore_eos": True, "n": 64}
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        server.family()
        server.process.send_signal(signal.SIGTERM)
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "shutting_down"
    assert server.process.wait(60) == 0
    assert not psutil.wait_procs(server.family(), timeout=5)[1]
    assert "Traceback" not in server.log.read_text()
