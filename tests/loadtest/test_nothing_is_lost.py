"""The command in a process of its own, ended, cut off or given odd places and files: no result is lost in silence."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from timed_server import Scripted

from guiderail.loadtest.client.open_files import allow
from guiderail.loadtest.command import add_arguments
from guiderail.loadtest.flags import options_of
from guiderail.loadtest.load import prompts, text_file, traffic
from guiderail.loadtest.load.plan import Plan, Requests
from guiderail.loadtest.load.runner import Load
from guiderail.loadtest.load.sweep import Sweep
from guiderail.loadtest.load.traffic import TrafficClass
from guiderail.loadtest.loadtest_error import LoadtestError
from guiderail.loadtest.report import saving, table
from guiderail.loadtest.report.result import Reporting

START = (
    "import resource, signal, sys; from guiderail.server.cli import main\n"
    "for name, soft in LIMITS: resource.setrlimit(getattr(resource, name), (soft, resource.getrlimit(getattr(resource, name))[1]))\n"
    "sys.exit(main(['loadtest', *sys.argv[1:]]))"
)


async def start(*flags: str, limits: tuple[tuple[str, int], ...] = (), **streams: Any) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    code = START.replace("LIMITS", repr(limits))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", code, *flags, **({"stdout": pipe, "stderr": pipe} | streams)
    )


def flags(server: Scripted, folder: Path, *more: str) -> list[str]:
    return ["--base-url", server.url, "--model", "m", "--result-dir", str(folder), "--save-result", *more]


async def answered(server: Scripted, count: int) -> None:
    async with asyncio.timeout(250):
        while len(server.served) < count:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_keeps_the_result_so_far(server: Scripted, tmp_path: Path, number: signal.Signals) -> None:
    process = await start(
        *flags(server, tmp_path, "--num-prompts", "100000", "--max-concurrency", "1", "--result-filename", "r.json")
    )
    await answered(server, 3)
    process.send_signal(number)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["interrupted"]
    assert 2 <= result["completed"] <= result["sent"] == sum(result["outcomes"].values()) < 100000
    assert "was interrupted" in out.decode()
    assert "Traceback" not in err.decode()


async def test_a_signal_while_it_waits_for_the_server_ends_it(tmp_path: Path) -> None:
    """Nothing is listening there, and it would wait for ten minutes."""
    process = await start("--base-url", "http://127.0.0.1:9", "--ready-check-timeout-sec", "600", "--num-warmups", "1")
    await asyncio.sleep(0)
    async with asyncio.timeout(250):
        while process.returncode is None:  # until its handlers are there the signal ends it without a word
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
    assert process.returncode in (1, -signal.SIGTERM)


async def test_a_closed_pipe_takes_nothing_but_the_table(server: Scripted, tmp_path: Path) -> None:
    read, write = os.pipe()
    process = await start(*flags(server, tmp_path, "--num-prompts", "3", "--result-filename", "r.json"), stdout=write)
    os.close(write)
    os.close(read)
    _, err = await process.communicate()
    assert process.returncode == 0
    assert err == b""
    assert json.loads((tmp_path / "r.json").read_text())["completed"] == 3


async def test_a_missing_standard_output_takes_nothing(server: Scripted, tmp_path: Path) -> None:
    line = 'exec "$0" "$@" >&- 2>&-'
    code = START.replace("LIMITS", "()")
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", line, sys.executable, "-P", "-c", code, *flags(server, tmp_path, "--num-prompts", "2", "--result-filename", "r.json")
    )  # fmt: skip
    assert await process.wait() == 0
    assert json.loads((tmp_path / "r.json").read_text())["completed"] == 2


async def test_the_soft_limit_of_open_files_is_raised(server: Scripted, tmp_path: Path) -> None:
    everybody = asyncio.Event()

    async def gate(number: int) -> None:
        if number + 1 == 150:
            everybody.set()
        await everybody.wait()  # all are open at once

    server.gate = gate
    load = ["--num-prompts", "150", "--max-concurrency", "150", "--result-filename", "r.json"]
    process = await start(*flags(server, tmp_path, *load), limits=(("RLIMIT_NOFILE", 100),))
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert json.loads((tmp_path / "r.json").read_text())["completed"] == 150


@pytest.mark.parametrize(
    ("load", "sweep", "refused"),
    [
        (Load(max_concurrency=10**9), None, True),
        (Load(count=10**9), None, True),
        (Load(max_concurrency=10**9, count=5), None, False),
        (Load(5.0, count=10**9), None, False),  # how many are in flight is the server's affair
        (Load(5.0, count=10**9, max_concurrency=10**9), None, False),
        (Load(duration_s=5), Sweep(None, users=10**9), True),
        (Load(duration_s=5, max_concurrency=10**9), Sweep([1.0]), False),
    ],
)
def test_more_open_files_than_the_hard_limit_are_refused(
    load: Load, sweep: Sweep | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 4096))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    if refused:
        with pytest.raises(LoadtestError, match=r"open files.*4096.*--max-concurrency"):
            allow(load, sweep)
        assert asked == []
    else:
        allow(load, sweep)
        assert asked == [(4096, 4096)]


@pytest.mark.parametrize("unusable", ["a file for a folder", "a folder for the file", "no room"])
async def test_what_cannot_be_saved_is_said_before_anything_is_sent(
    server: Scripted, tmp_path: Path, unusable: str
) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder").mkdir()
    place = {
        "a file for a folder": (["--result-dir", str(tmp_path / "taken"), "--result-filename", "r.json"], ()),
        "a folder for the file": (["--result-filename", "folder"], ()),
        "no room": (["--result-filename", "r.json"], (("RLIMIT_FSIZE", 1000),)),
    }[unusable]
    process = await start(*flags(server, tmp_path, "--num-prompts", "3"), *place[0], limits=place[1])
    _, err = await process.communicate()
    assert process.returncode == 1
    assert err.startswith(b"guiderail: --result-")
    assert err.count(b"\n") == 1
    assert server.served == []


def test_the_folders_of_a_name_are_made(tmp_path: Path) -> None:
    saving.prepare(str(tmp_path / "a"), "nightly/r.json")
    assert list((tmp_path / "a" / "nightly").iterdir()) == []


def about(label: str = "l", model: str = "m") -> Reporting:
    return Reporting(label, model, "u", "/e", 0)


RESULT = {"kind": "run", "request_rate": 0.5, "date": "d"}


def test_dots_in_names_are_no_suffixes(tmp_path: Path) -> None:
    for name in ("rate0.5", "rate0.7", "rate0.7.json"):
        path = saving.result_path(str(tmp_path), name, about(), RESULT)
        assert path == tmp_path / name
        for suffix in (".requests.jsonl", ".html"):
            saving.save(saving.beside(path, suffix), name)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"rate0.{n}{suffix}" for n in (5, 7) for suffix in (".requests.jsonl", ".html")}
    path = saving.result_path(str(tmp_path), None, about(model="org/Qwen2.5-0.5B"), RESULT)
    assert saving.beside(path, ".html").name == "l-0.5qps-Qwen2.5-0.5B-d.html"


def test_made_up_names_are_names_of_files_and_are_never_taken_twice(tmp_path: Path) -> None:
    names = []
    for suffix in (".json", ".requests.jsonl", ".html", ".json"):
        path = saving.result_path(str(tmp_path), None, about("a/b", "m" * 500), RESULT)
        assert path.parent == tmp_path
        saving.save(saving.beside(path, suffix), "x")
        names.append(path.name)
    assert len(set(names)) == 4
    assert max(map(len, names)) < 255


def test_a_file_is_replaced_as_a_whole_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving.tempfile, "gettempdir", lambda: str(tmp_path / "spare"))
    path = tmp_path / "r.json"
    saving.save(path, "before")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.os, "fsync", full)
    with pytest.raises(LoadtestError, match="No space left"):
        saving.save(path, "after")
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["r.json"]


def test_where_a_file_cannot_be_written_another_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "file").write_text("")
    saved = saving.save(tmp_path / "file" / "r.json", "text")
    assert saved.parent == tmp_path
    assert saved.read_text() == "text"


ODD = "one\u2028two\u0085three\x0cfour\x0b\x1c\u2029five"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "BOM"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "not ended"])
def test_only_line_feeds_end_lines(tmp_path: Path, mark: str, end: str, last: bool) -> None:
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    rows = [json.dumps({"prompt": ODD}, ensure_ascii=False), json.dumps("two"), '{"messages": [{"role": "user"}]}']
    lines.write_bytes((mark + end.join(rows) + end * last).encode())
    assert prompts.load(lines) == [ODD, "two", [{"role": "user"}]]
    plain.write_bytes((mark + end.join([ODD, "", "two"]) + end * last).encode())
    assert prompts.load(plain) == [ODD, "two"]


def test_carriage_returns_within_lines_are_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a\rb\nc\n")
    assert prompts.load(tmp_path / "p.txt") == ["a\rb", "c"]


def test_a_byte_order_mark_is_no_text_in_any_file(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_bytes("\ufeffclasses:\r\n- {name: a}\r\n".encode())
    assert [kind.name for kind in traffic.load(tmp_path / "t.yaml")] == ["a"]
    (tmp_path / "r.json").write_bytes('\ufeff{"kind": "run"}'.encode())
    from guiderail.loadtest.report import compare

    assert compare.load(tmp_path / "r.json") == {"kind": "run"}


@pytest.mark.parametrize(
    "line", ["NaN", '{"prompt": NaN}', "[" * 100_000, "{", '{"prompt": null}', "3"], ids=lambda s: s[:9]
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'"fine"\n{line}\n')
    with pytest.raises(LoadtestError, match=r"p\.jsonl:2"):
        prompts.load(tmp_path / "p.jsonl")


@pytest.mark.parametrize("text", ["NaN", "[" * 100_000, "{"], ids=lambda s: s[:9])
def test_only_json_is_json(text: str) -> None:
    with pytest.raises(ValueError):
        text_file.parse_json(text)


@pytest.mark.parametrize(
    ("extra", "kind", "streams", "usage"),
    [
        ({}, {}, True, {"include_usage": True}),
        ({"stream": False}, {}, False, None),
        ({"stream": None}, {}, None, None),
        ({}, {"stream": False}, False, None),
        ({"stream": True}, {"stream": False}, True, {"include_usage": True}),
        ({"stream": False}, {"body": {"stream": True}}, True, {"include_usage": True}),
        ({"stream_options": {"include_usage": False}}, {}, True, {"include_usage": False}),
    ],
)
def test_usage_is_asked_for_where_an_answer_streams(extra: Any, kind: Any, streams: Any, usage: Any) -> None:
    requests = Requests("u", "/v1/completions", "m", body=extra, prompts=["p"])
    body = json.loads(next(Plan([TrafficClass(**kind)], requests, 0)).body)
    assert (body["stream"], body.get("stream_options")) == (streams, usage)


async def test_an_extra_body_without_streaming_measures_the_whole_answer(server: Scripted, tmp_path: Path) -> None:
    more = [
        "--num-prompts",
        "2",
        "--max-concurrency",
        "1",
        "--extra-body",
        '{"stream": false}',
        "--result-filename",
        "r.json",
    ]
    process = await start(*flags(server, tmp_path, *more))
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert json.loads((tmp_path / "r.json").read_text())["latency_ms"]["e2el"]["count"] == 2
    assert all("stream_options" not in served.body for served in server.served)


def test_detailed_results_are_saved_without_being_asked_for_twice() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert options_of(parser.parse_args(["--save-detailed"])).detailed


def shown(width: int, names: list[str], columns: int) -> list[str]:
    console = Console(width=width, highlight=False, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    head = ["", *(f"p{column}" for column in range(columns))]
    table.print_table(console, "Latency", head, [[name, *["123,456.7"] * columns] for name in names])
    return console.export_text().splitlines()


@pytest.mark.parametrize("columns", [1, 4, 8, 30])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_table_fits_its_columns(width: int, columns: int) -> None:
    lines = shown(width, ["TTFT from send (ms)", "[bold]a class[/wrong]", "名" * 40, "x" * 90], columns)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert text.count("123,456.7") == 4 * columns
    assert all(f"p{column} " in text + " " for column in range(columns))
    assert "[bold]a class[/wrong]" in text
    assert text.count("Latency") == 1


def test_a_sweep_that_meets_its_objectives_at_no_load_says_so_of_its_own_loads() -> None:
    stage = {"goodput": {"attainment": 0.1}}
    result = {
        "kind": "sweep",
        "stages": [stage],
        "knee_rps": 2.0,
        "saturation_rps": None,
        "capacity_rps": None,
        "wanted_attainment": 0.95,
    }
    assert table.summary_lines(result)[-1] == "At least 95% of requests are good at none of these loads."
