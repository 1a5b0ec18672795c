"""The command: its flags and their errors, one whole run in a process of its own, and Ctrl-C."""

import argparse
import asyncio
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from timed_server import Scripted

from guiderail.loadtest.command import add_arguments, run
from guiderail.loadtest.flags import options_of
from guiderail.loadtest.load.arrivals import Ramp
from guiderail.loadtest.loadtest_error import LoadtestError

MAIN = (
    "import argparse, sys; from guiderail.loadtest import command; parser = argparse.ArgumentParser(); "
    "command.add_arguments(parser); status = command.run(parser.parse_args()); "
    "print([m for m in ('torch', 'vllm', 'transformers', 'guiderail.server') if m in sys.modules]); sys.exit(status)"
)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return parser.parse_args(flags)


def options(*flags: str) -> Any:
    return options_of(parse(*flags))


def test_the_flags_of_vllm_bench_serve_mean_the_same() -> None:
    made = options(
        *["--backend", "openai-chat", "--base-url", "http://h:1/", "--endpoint", "/v1/chat/completions", "--model", "m", "--request-rate", "8"],
        *["--burstiness", "0.5", "--max-concurrency", "32", "--num-prompts", "200", "--num-warmups", "4", "--seed", "3", "--ignore-eos"],
        *["--goodput", "ttft:500", "e2el:4000", "--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99.9"],
        *["--temperature", "0", "--top-p", "0.9", "--header", "a=b", "c=d=e", "--metadata", "gpu=none", "--label", "x", "--request-id-prefix", "r-"],
        *["--ready-check-timeout-sec", "3", "--disable-tqdm", "--save-result", "--save-detailed", "--result-dir", "d"],
        "--extra-body", '{"alignment": "upbeat", "top_p": 0.8}',
    )  # fmt: skip
    load = made.load
    assert (load.rate, load.burstiness, load.max_concurrency, load.count, load.duration_s) == (8, 0.5, 32, 200, None)
    assert made.requests.base_url == "http://h:1"
    assert made.requests.body == {"temperature": 0, "top_p": 0.8, "ignore_eos": True, "alignment": "upbeat"}
    assert made.requests.slos == {"ttft": 500, "e2el": 4000}
    assert (made.about.percentile_metrics, made.about.percentiles) == (["ttft", "e2el"], [50, 99.9])
    assert (made.seed, made.num_warmups, made.ready_timeout_s, made.detailed) == (3, 4, 3, True)
    assert made.headers == {"a": "b", "c": "d=e"}
    assert made.about.metadata == {"gpu": "none"}


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    made = options()
    assert (made.load.rate, made.load.count, made.load.max_concurrency) == (math.inf, 1000, None)
    assert made.requests.base_url + made.requests.endpoint == "http://127.0.0.1:8000/v1/chat/completions"
    assert made.headers == {"Authorization": "Bearer secret"}
    assert options("--api-key", "mine").headers == {"Authorization": "Bearer mine"}
    assert options("--base-url", "http://h/v1").requests.base_url == "http://h"  # as OpenAI clients write it
    assert options("--backend", "vllm").requests.endpoint == "/v1/completions"
    assert options("--duration", "5", "--request-rate", "2").load.count is None
    assert options("--cancellation-rate", "0.1").requests.cancellation.chunks == (1, 16)
    timed = options("--cancellation-rate", "0.1", "--cancel-after-s", "0.5-2").requests.cancellation
    assert (timed.chunks, timed.seconds) == (None, (0.5, 2.0))
    ramp = options(*["--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "8"])
    assert ramp.load.rate == Ramp("exponential", 1, 8)
    assert options("--sweep-rates", "4,2").sweep.rates == [4, 2]
    assert options("--sweep-rates", "auto").sweep.rates is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--request-rate 0", "--request-rate: expected a number above 0"),
        ("--burstiness -1", "--burstiness"),
        ("--num-prompts 0", "--num-prompts: expected at least 1"),
        ("--max-concurrency 0", "--max-concurrency"),
        ("--seed -1", "--seed"),
        ("--goodput ttft", "--goodput ttft: expected NAME:MILLISECONDS"),
        ("--goodput speed:3", "--goodput speed:3"),
        ("--goodput ttft:-1", "--goodput ttft:-1"),
        ("--percentile-metrics ttft,speed", "'speed' is none of ttft"),
        ("--metric-percentiles 50,x", "--metric-percentiles 50,x"),
        ("--metric-percentiles 101", "--metric-percentiles 101"),
        ("--ramp-up-strategy linear", "--ramp-up-strategy needs"),
        ("--ramp-up-start-rps 3", "need --ramp-up-strategy"),
        ("--duration 3", "--duration needs"),
        ("--sweep-rates 1,2 --request-rate 3", "--sweep-rates and --request-rate cannot be used together"),
        ("--sweep-rates fast", "--sweep-rates fast"),
        ("--cancellation-rate 2", "--cancellation-rate"),
        ("--cancel-after-tokens 9-3", "--cancel-after-tokens 9-3"),
        ("--header novalue", "--header novalue: expected KEY=VALUE"),
        ("--extra-body [1]", "--extra-body: expected a JSON object"),
        ("--traffic nowhere.yaml", "--traffic nowhere.yaml"),
        ("--dataset-path nowhere.txt", "nowhere.txt"),
    ],
)
def test_errors_name_the_flag(flags: str, says: str) -> None:
    with pytest.raises(LoadtestError) as error:
        options(*flags.split())
    assert says in str(error.value)


def test_one_parser_serves_runs_and_compare(tmp_path: Path) -> None:
    assert parse("--goodput", "ttft:1", "e2el:2").loadtest_task is None
    args = parse("compare", "a.json", str(tmp_path / "b.json"))
    assert (args.loadtest_task, args.a) == ("compare", Path("a.json"))
    with pytest.raises(LoadtestError, match=r"a\.json"):
        run(args)


async def start(*flags: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", MAIN, *flags, stdout=pipe, stderr=pipe)


async def test_a_whole_run(server: Scripted, tmp_path: Path) -> None:
    server.default = {"tokens": 4, "score": 0.25}
    names = ["--base-url", server.url, "--result-dir", str(tmp_path), "--result-filename", "r.json", "--api-key", "k"]
    saves = ["--save-result", "--save-requests", "--save-report"]
    process = await start(*names, *saves, "--request-rate", "200", "--num-prompts", "30", "--goodput", "e2el:3000")
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert err == b""  # no progress where there is no terminal
    text = out.decode()
    assert "30 of 30 requests completed" in text
    assert "TTFT (ms)" in text
    assert text.endswith("[]\n"), "it imports none of torch, vllm, transformers, guiderail.server"
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["model_id"], result["goodput"]["good"]) == (30, "scripted", 30)
    assert len((tmp_path / "r.requests.jsonl").read_text().splitlines()) == 30
    assert "<svg" in (tmp_path / "r.html").read_text()
    assert {s.headers["Authorization"] for s in server.served} == {"Bearer k"}
    assert "Bearer" not in (tmp_path / "r.json").read_text()
    prompts = {s.body["messages"][0]["content"] for s in server.served}
    assert len(prompts) == 30


async def test_ctrl_c_keeps_the_result_so_far(server: Scripted, tmp_path: Path) -> None:
    flags = ["--base-url", server.url, "--request-rate", "50", "--result-dir", str(tmp_path), "--save-result"]
    process = await start(*flags, "--result-filename", "r.json")
    async with asyncio.timeout(20):
        while len(server.served) < 10:
            await asyncio.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert "stopping" in err.decode()
    assert "was interrupted" in out.decode()
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["interrupted"]
    assert 9 <= result["sent"] == sum(result["outcomes"].values()) < 1000
