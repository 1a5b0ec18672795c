"""The HTML report, sweeps, and the comparison of results."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from loadtest_harness import kind, load_test
from timed_server import Scripted

from guiderail.loadtest.load.runner import Load
from guiderail.loadtest.load.sweep import FRACTIONS, Sweep, sweep_result
from guiderail.loadtest.loadtest_error import LoadtestError
from guiderail.loadtest.report import compare, table
from guiderail.loadtest.report import page as report
from guiderail.loadtest.report.result import Reporting
from guiderail.loadtest.report.saving import json_text, save

RUN_PLOTS = {"latency-time", "latency-curve", "reward-latency", "outcomes-time", "spend"}
SWEEP_PLOTS = {
    "latency-load", "goodput-knee", "reward-latency", "reward-load", "outcomes-time", "outcomes-load", "spend",
}  # fmt: skip
MIXED = [kind("plain", 2), kind("guided", 1, score=0.5, spread=0.1, ttft=0.01), kind("busy", 0.3, fault=429)]


class Page(HTMLParser):
    """Sections with what is drawn in them, and every reference that a browser would follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.drawn: dict[str, int] = {}
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if tag == "section":
            self._section = given.get("id", "")
            self.drawn[self._section] = 0
        if tag in ("path", "use", "image"):
            self.drawn[self._section] += 1
        if tag == "clippath":
            self.ids.append(given["id"])
        self.references += [v for k, v in given.items() if k in ("href", "src", "xlink:href", "action", "srcset")]


def check(text: str, plots: set[str], missing: tuple[str, ...] = ()) -> None:
    page = Page(text)
    assert plots == {name for name in page.drawn if name}
    for name in plots:
        assert (page.drawn[name] > 20) == (name not in missing), name
    assert text.count("Not drawn:") == len(missing)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert not {"script", "link", "iframe", "img", "base"} & set(page.tags)
    outside = re.findall(r"url\((?!#)[^)]*\)|@import", text)
    assert not outside
    assert len(page.ids) == len(set(page.ids)) > 0  # plots do not clip one another
    assert len(text) < 2_000_000


async def test_the_report_of_a_run_has_every_plot_and_needs_nothing_else(server: Scripted) -> None:
    result, runs = await load_test(server, MIXED, Load(300.0, count=150), slos={"ttft": 500})
    text = report.page(result, runs)
    check(text, RUN_PLOTS)
    for shown in ("guided", "busy", "scripted 429", "good requests", "reward per second", "E2E latency (ms)"):
        assert shown in text


async def test_plots_without_data_say_why(server: Scripted) -> None:
    result, runs = await load_test(server, [kind()], Load(300.0, count=20))
    text = report.page(result, runs)
    check(text, RUN_PLOTS, missing=("reward-latency", "spend"))
    assert "no answer carried a score" in text
    result, runs = await load_test(server, [kind("&lt;<b>", fault=503)], Load(300.0, count=20))
    text = report.page(result, runs)
    check(text, RUN_PLOTS, missing=("latency-time", "latency-curve", "reward-latency", "spend"))
    assert "<b>" not in re.sub(r'<div class="tile">.*?</div>', "", text)
    assert "&amp;lt;&lt;b&gt;" in text


async def test_a_sweep_finds_the_saturation_and_reports_it(server: Scripted) -> None:
    kinds = [kind("plain", 2), kind("guided", 1, score=0.5, tokens=3)]
    base = Load(count=10)
    result, runs = await load_test(server, kinds, base, slos={"e2el": 2000}, sweep=Sweep(None, users=4))
    saturation = result["saturation_rps"]
    assert runs[0].load.closed
    rates = [stage["request_rate"] for stage in result["stages"]]
    assert rates == pytest.approx([saturation * f for f in FRACTIONS], rel=0.01)
    assert [run.load.rate for run in runs[1:]] == rates
    assert [stage["sent"] for stage in result["stages"]] == [10] * len(FRACTIONS)
    indices = [record.index for run in runs for record in run.records]
    assert indices == list(range(10 * (len(FRACTIONS) + 1)))  # no stage repeats the requests of another
    check(report.page(result, runs), SWEEP_PLOTS)
    assert "At least 95% of requests are good up to" in "".join(table.summary_lines(result))
    json.dumps(result, allow_nan=False)


def stage(rate: float, throughput: float, good: float | None) -> dict[str, Any]:
    goodput = None if good is None else {"attainment": good / rate, "request_goodput": good}
    return {
        "date": "d", "request_rate": rate, "request_throughput": throughput, "request_goodput": good,
        "goodput": goodput, "interrupted": False,
    }  # fmt: skip


def test_knee_and_capacity_of_a_sweep() -> None:
    about = Reporting("l", "m", "u", "/e", 0)
    stages = [stage(1, 1, 1), stage(2, 2, 1.96), stage(3, 3, 2.4), stage(4, 3.2, 0.0), stage(5, 3.3, 0.0)]
    made = sweep_result(stages, None, Sweep([1]), about)
    assert (made["knee_rps"], made["capacity_rps"]) == (3, 2)
    assert sweep_result(stages, None, Sweep([1], attainment=0.7), about)["capacity_rps"] == 3
    assert sweep_result(stages, None, Sweep([1], attainment=1.0), about)["capacity_rps"] == 1
    hopeless = sweep_result([stage(1, 1, 0.0)], None, Sweep([1]), about)
    assert hopeless["capacity_rps"] is None
    free = sweep_result([stage(1, 1, None), stage(2, 1.5, None)], None, Sweep([1]), about)
    assert (free["knee_rps"], free["capacity_rps"]) == (2, None)


async def test_compare_gives_ratios_with_both_values(server: Scripted, tmp_path: Path, capsys: Any) -> None:
    for name, ttft in (("a", 0.02), ("b", 0.06)):
        mixed = [kind("plain", ttft=ttft), kind("guided", ttft=0.01, score=0.5 if name == "a" else 0.75)]
        result, _ = await load_test(server, mixed, Load(200.0, count=40, max_concurrency=30 if name == "a" else 40))
        save(tmp_path / f"{name}.json", json_text(result))
    a, b = (compare.load(tmp_path / f"{name}.json") for name in "ab")
    rows = {name: (x, y) for name, x, y in compare.rows(a, b)}
    assert rows["plain: ttft p50 (ms)"] == tuple(r["classes"]["plain"]["latency_ms"]["ttft"]["median"] for r in (a, b))
    assert rows["ttft p99.9 (ms)"] == tuple(r["latency_ms"]["ttft"]["percentiles"]["99.9"] for r in (a, b))
    assert rows["guided: reward mean"] == (0.5, 0.75)
    compare.compare(tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.html")
    printed = capsys.readouterr().out
    assert "max_concurrency: 30 against 40" in printed
    assert re.search(r"guided: reward mean +0.50 +0.75 +1.500", printed)
    page = (tmp_path / "c.html").read_text()
    assert "<td>guided: reward mean</td><td>0.50</td><td>0.75</td><td>1.500</td>" in page
    assert not Page(page).references


def test_ratios_that_mean_nothing_are_dashes() -> None:
    assert [compare.ratio(*pair) for pair in ((2, 3), (0, 3), (None, 3), (-1, 2), (2, 0))] == ["1.500", *"---", "0.000"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"kind": "run"}')
    (tmp_path / "b.json").write_text('{"kind": "sweep"}')
    (tmp_path / "c.json").write_text('{"duration": 3}')
    with pytest.raises(LoadtestError, match="a run and a sweep cannot be compared"):
        compare.compare(tmp_path / "a.json", tmp_path / "b.json", None)
    for name in ("c.json", "none.json"):
        with pytest.raises(LoadtestError, match=name):
            compare.load(tmp_path / name)


async def test_the_notes_say_what_not_to_overlook(server: Scripted) -> None:
    result, _ = await load_test(server, [kind(no_usage=True), kind("b", fault=503)], Load(300.0, count=20))
    notes = table.notes(result)
    assert any("no usage" in note for note in notes)
    assert f"{result['classes']['b']['sent']} x scripted 503" in notes
    late = result["latency_ms"]["client_queue_time"]["percentiles"]
    late["99"] = 25.0
    assert any("too busy" in note for note in table.notes(result))
    late["99"] = 2.0
    assert not any("too busy" in note for note in table.notes(result))


def test_numbers_are_short() -> None:
    shown = [table.number(x) for x in (None, 3, 0.0, 12345.6, 123.45, 12.345, 0.01234, "inf")]
    assert shown == ["-", "3", "0", "12,346", "123.5", "12.35", "0.0123", "inf"]
