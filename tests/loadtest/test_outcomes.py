"""Outcomes of requests: every kind, by class, in exact balance with what the server saw."""

import asyncio
import socket
from collections import Counter
from typing import Any

import pytest
from loadtest_harness import by_id, kind, load_test
from timed_server import Scripted
from virtual_time import in_virtual_time

from guiderail.loadtest.load.plan import Cancellation
from guiderail.loadtest.load.runner import Load
from guiderail.loadtest.load.traffic import TrafficClass
from guiderail.loadtest.loadtest_error import LoadtestError
from guiderail.loadtest.report.records import Outcome

FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {  # class: script, outcome, what its error says
    "fine": ({}, "completed", ""),
    "whole": ({"stream": False}, "completed", ""),
    "no_usage": ({"no_usage": True, "tokens": 3}, "completed", ""),
    "busy": ({"fault": 429}, "rejected_429", "scripted 429"),
    "down": ({"fault": 503}, "http_error", "scripted 503"),
    "wrong": ({"fault": 400, "stream": False}, "http_error", "scripted 400"),
    "dropped": ({"fault": "drop"}, "connection_error", "Disconnected"),
    "error": ({"fault": "error", "tokens": 3, "after": 2}, "stream_error", "scripted mid-stream error"),
    "cut": ({"fault": "cut", "tokens": 3}, "stream_error", "without [DONE]"),
    "no_done": ({"fault": "no_done"}, "completed", ""),  # its choice has finished
    "garbage": ({"fault": "garbage", "tokens": 3}, "stream_error", "not a JSON object"),
    "hanging": ({"fault": "hang", "tokens": 3}, "timeout", "not finished after 1.5 s"),
}


async def test_each_kind_of_end_is_told_apart_and_all_balance(server: Scripted) -> None:
    classes = [
        kind(name, stream=script.get("stream", True), **{k: v for k, v in script.items() if k != "stream"})
        for name, (script, _, _) in FAULTS.items()
    ]
    load = Load(500.0, count=240)
    result, (run,) = await load_test(server, classes, load, slos={"e2el": 10_000}, timeout_s=1.5, detailed=True)
    assert len(server.served) == len(run.records) == result["sent"] == 240
    assert sum(result["outcomes"].values()) == 240
    for name, (_, outcome, says) in FAULTS.items():
        mine = [record for record in run.records if record.class_name == name]
        group = result["classes"][name]
        assert group["sent"] == group["outcomes"][outcome] == len(mine) > 5
        assert sum(group["outcomes"].values()) == len(mine)
        assert all(says in record.error and bool(record.error) == bool(says) for record in mine), mine
    for outcome in Outcome:
        assert result["outcomes"][outcome] == sum(g["outcomes"][outcome] for g in result["classes"].values())
    fine = sum(result["classes"][name]["sent"] for name in ("fine", "whole", "no_usage", "no_done"))
    assert result["completed"] == fine
    assert result["failed"] == 240 - fine
    good = result["goodput"]  # errors of every kind count against it
    assert (good["good"], good["counted"], good["attainment"]) == (fine, 240, fine / 240)
    assert result["http_status"]["503"] == result["classes"]["down"]["sent"]
    assert [bool(error) for error in result["errors"]] == [r.outcome is not Outcome.COMPLETED for r in run.records]
    assert {r.retry_after_s for r in run.records if r.class_name == "busy"} == {0.05}
    assert result["latency_ms"]["rejection"]["count"] == result["classes"]["busy"]["sent"]
    assert result["latency_ms"]["e2el"]["count"] == fine
    assert not result["tokens_counted"]
    assert {r.output_tokens for r in run.records if r.class_name == "no_usage"} == {3}


async def test_clients_hang_up_after_tokens(server: Scripted) -> None:
    cancellation = Cancellation(0.5, chunks=(2, 4))
    slow = [kind(ttft=0.01, itl=0.01, tokens=30)]
    result, (run,) = await load_test(server, slow, Load(150.0, count=40), cancellation=cancellation, slos={"ttft": 5e3})
    gone = [record for record in run.records if record.outcome is Outcome.CANCELLED]
    assert result["outcomes"]["cancelled"] == len(gone)
    assert 8 < len(gone) < 32
    assert {len(record.chunks) for record in gone} == {2, 3, 4}
    assert result["completed"] == 40 - len(gone)
    assert result["failed"] == 0
    assert result["goodput"] | {"request_goodput": 0} == {
        "good": 40 - len(gone), "counted": 40 - len(gone), "attainment": 1.0, "request_goodput": 0,
    }  # fmt: skip
    await asyncio.sleep(0.05)
    noted = by_id(server, run.records)
    assert [s.gone for s in noted] == [r.outcome is Outcome.CANCELLED for r in run.records]  # the server is told


@in_virtual_time
async def test_clients_hang_up_after_a_time_even_if_nothing_came() -> None:
    async with Scripted().running() as server:
        hanging = [TrafficClass(name="w", stream=False, cancellation_rate=1.0, body={"script": {"ttft": 30}})]
        cancellation = Cancellation(0.0, chunks=None, seconds=(0.05, 0.15))
        result, (run,) = await load_test(server, hanging, Load(200.0, count=20), cancellation=cancellation)
        assert result["outcomes"]["cancelled"] == 20
        assert all(0.05 <= record.e2el_from_send < 0.4 for record in run.records)
        with pytest.raises(LoadtestError, match=r"class 'w' does not stream.*--cancel-after-s"):
            await load_test(server, hanging, Load(200.0, count=20))


async def test_no_server_is_a_connection_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    result, _ = await load_test(url, [kind()], Load(max_concurrency=1, count=2))
    assert result["outcomes"]["connection_error"] == 2
    assert result["http_status"] == {}
    with pytest.raises(LoadtestError, match=r"no warm-up request completed: connection_error"):
        await load_test(url, [kind()], Load(count=2), num_warmups=1)
    with pytest.raises(LoadtestError, match="/v1/models"):
        await load_test(url, [kind()], Load(count=2), ready_timeout_s=0.01)


@in_virtual_time
async def test_a_rejected_user_of_a_closed_loop_comes_back_when_told() -> None:
    async with Scripted().running() as server:
        result, (run,) = await load_test(server, [kind(fault=429)], Load(max_concurrency=1, count=5))
        gaps = [b.sent - a.end for a, b in zip(run.records, run.records[1:], strict=False)]
        assert result["outcomes"]["rejected_429"] == 5
        assert all(0.05 <= gap < 0.3 for gap in gaps)


@in_virtual_time
async def test_an_interrupted_run_still_balances() -> None:
    async with Scripted().running() as server:
        stop = asyncio.Event()

        async def after_thirty(number: int) -> None:
            if number == 30:
                stop.set()

        server.gate = after_thirty
        mixed = [kind("slow", ttft=30), kind("quick", tokens=3)]
        result, (run,) = await load_test(server, mixed, Load(50.0, count=10_000), stop=stop)
        assert result["interrupted"]
        assert run.duration_s < 20
        counts = Counter(record.class_name for record in run.records)
        assert result["classes"]["slow"]["outcomes"]["cancelled"] == counts["slow"] > 2
        quick = result["classes"]["quick"]["outcomes"]
        assert quick["completed"] + quick["cancelled"] == counts["quick"]
        assert quick["completed"] > 2
        assert sum(result["outcomes"].values()) == len(run.records)
        await asyncio.sleep(0.05)
        assert 31 <= len(server.served) <= len(run.records)  # the last may not have reached it


@in_virtual_time
async def test_a_duration_ends_a_closed_loop() -> None:
    async with Scripted().running() as server:
        result, (run,) = await load_test(server, [kind(ttft=0.01)], Load(max_concurrency=2, duration_s=0.5))
        assert 0.5 <= run.duration_s < 1.0
        assert result["sent"] == result["completed"] > 20


async def test_warm_ups_are_sent_but_not_counted(server: Scripted) -> None:
    result, (run,) = await load_test(server, [kind()], Load(count=3), num_warmups=5)
    assert result["sent"] == 3
    assert len(server.served) == 8
    server.served.clear()
    _, (without,) = await load_test(server, [kind()], Load(count=3))
    assert [s.body for s in server.served] == [s.body for s in by_id(server, without.records)]
    assert [r.index for r in run.records] == [r.index for r in without.records] == [0, 1, 2]
