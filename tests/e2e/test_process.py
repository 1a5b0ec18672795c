"""`guiderail serve` as a process: start, engine loss and return, SIGTERM, Ctrl-C, and nothing left behind."""

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from serve_process import Serve


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    servers: list[Serve] = []

    def start(*flags: str, env: dict[str, str] | None = None) -> Serve:
        servers.append(Serve(tmp_path / f"{len(servers)}.log", *flags, env=env))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_survives_its_engine_and_leaves_nothing_on_sigterm(
    started: Callable[..., Serve], model_path: str
) -> None:
    server = started()
    server.wait(lambda: server.health() == 200, 120)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).status_code == 200

    (core,) = (p for p in server.family() if "EngineCore" in "".join(p.cmdline()))
    assert not [p for p in server.family() if "Worker" in "".join(p.cmdline())], "the model is in the scheduler's"
    pinned = [cpu for thread in core.threads() if len(on := os.sched_getaffinity(thread.id)) == 1 for cpu in on]
    assert sorted(pinned) == sorted(os.sched_getaffinity(0)), "OpenMP has a thread for each CPU, nothing else is pinned"
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        (huge,) = re.findall(r"AnonHugePages: *(\d+)", Path(f"/proc/{core.pid}/smaps_rollup").read_text())
        assert int(huge) * 1024 > 0.25 * 2**30, "the KV cache at least"
    core.kill()
    server.wait(lambda: server.health() == 503, 10)
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    server.wait(lambda: server.health() == 200, 120)
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).status_code == 200
    assert "guiderail:engine_restarts_total" in (metrics := httpx.get(f"{server.url}/metrics").text)
    assert 'engine_restarts_total{model_name="smollm2-135m-instruct"} 1.0' in metrics

    assert server.end(signal.SIGTERM) == 0
    assert "stopped" in server.log.read_text()


@pytest.mark.slow
def test_a_killed_server_takes_its_engines_with_it(
    started: Callable[..., Serve], model_path: str, reward_head: str
) -> None:
    server = started("--reward", f"head={reward_head},backend=vllm")
    server.wait(lambda: server.health() == 200, 120)
    family = server.family()
    assert sum("EngineCore" in "".join(p.cmdline()) for p in family) == 2
    server.process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.mark.slow
def test_ctrl_c_while_starting_leaves_nothing(started: Callable[..., Serve], model_path: str) -> None:
    server = started()
    server.wait(lambda: any("EngineCore" in "".join(p.cmdline()) for p in server.family()), 60)
    assert server.end(signal.SIGINT) == 130
    assert "stopped while starting" in server.log.read_text()


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
    assert server.process.wait(60) == 1
    last = server.log.read_text().strip().splitlines()[-1]
    assert last.startswith("guiderail: ")
    assert message in last


def test_a_port_in_use_is_told_before_the_engine_starts(started: Callable[..., Serve]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = started("--port", str(port))
        assert server.process.wait(60) == 1
    said = server.log.read_text().strip().splitlines()
    assert said == [
        f"guiderail: cannot listen on http://127.0.0.1:{port}: Address already in use; choose with --host and --port"
    ]


def test_a_broken_plugin_stops_the_start(started: Callable[..., Serve], model_path: str, tmp_path: Path) -> None:
    (tmp_path / "sour.py").write_text("raise RuntimeError('sour milk')")
    info = tmp_path / "sour-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sour\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[guiderail.guides]\nsour = sour:Guide\n")
    server = started(env={"PYTHONPATH": str(tmp_path)})
    assert server.process.wait(60) == 1
    assert "'sour'" in server.log.read_text()
    assert "sour milk" in server.log.read_text()
