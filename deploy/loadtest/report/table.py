"""Results as tables on the terminal."""

import sys
from collections import Counter
from collections.abc import Sequence
from io import StringIO, TextIOWrapper
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

NAMES = {
    "ttft": "TTFT (ms)",
    "tpot": "TPOT (ms)",
    "itl": "ITL (ms)",
    "e2el": "E2E latency (ms)",
    "ttft_from_send": "TTFT from send (ms)",
    "e2el_from_send": "E2E from send (ms)",
    "client_queue_time": "Sent late by (ms)",
    "server_queue_time": "Server queue (ms)",
    "rejection": "Time to a 429 (ms)",
}
ERRORS = ("http_error", "connection_error", "stream_error", "timeout")
WIDTH = 80  # columns, where the output is no terminal that says how many it has
WIDEST = (36, 16)  # a table's first column, and each other one; what is longer is folded
LATE_MS = 10.0  # later than this, the client itself is the bottleneck


def number(value: float | str | None) -> str:
    """Three or four significant figures; a dash where there is no value."""
    if value is None:
        return "-"
    if isinstance(value, int | str):
        return str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}".removesuffix(".0")
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"


def share(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.1f}%"


def latency_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of latencies. Metrics without values are left out."""
    latency = result["latency_ms"]
    ranks = list(latency["ttft"]["percentiles"])
    head = ["", "mean", *(f"p{rank}" for rank in ranks), "max", "n"]
    rows = []
    for key, name in NAMES.items():
        of = latency[key]
        if of["count"]:
            metrics = [of["mean"], *(of["percentiles"][rank] for rank in ranks), of["max"]]
            rows.append([name, *map(number, metrics), str(of["count"])])
    return head, rows


def class_rows(groups: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table that compares groups of requests."""
    head = [
        "", "sent", "completed", "429", "errors", "cancelled", "req/s", "tok/s", "TTFT p50", "TTFT p99", "E2E p50",
        "E2E p99", "good", "reward", "reward/s", "discarded", "scoring",
    ]  # fmt: skip
    rows = []
    for name, group in groups.items():
        outcomes, latency = group["outcomes"], group["latency_ms"]
        reward, spend, goodput = group["reward"], group["spend"] or {}, group["goodput"] or {}
        rows.append(
            [
                name,
                str(group["sent"]),
                *(str(outcomes[key]) for key in ("completed", "rejected_429")),
                str(sum(outcomes[key] for key in ERRORS)),
                str(outcomes["cancelled"]),
                number(group["request_throughput"]),
                number(group["output_throughput"]),
                number(latency["ttft"]["median"]),
                number(latency["ttft"]["percentiles"].get("99")),
                number(latency["e2el"]["median"]),
                number(latency["e2el"]["percentiles"].get("99")),
                share(goodput.get("attainment")),
                number(reward["score"]["mean"]) if reward else "-",
                number(reward["per_s"]) if reward else "-",
                share(spend.get("discarded_share")),
                share(spend.get("scoring_share")),
            ]
        )
    return head, _without_empty_columns(head, rows)


def _without_empty_columns(head: list[str], rows: list[list[str]]) -> list[list[str]]:
    for column in range(len(head) - 1, 0, -1):
        if all(row[column] == "-" for row in rows):
            del head[column]
            for row in rows:
                del row[column]
    return rows


def stage_groups(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups that the table of classes shows: the classes and their total, or the stages of a sweep."""
    if result["kind"] == "sweep":
        return {f"{stage['request_rate']:g} req/s": stage for stage in result["stages"]}
    classes: dict[str, dict[str, Any]] = result["classes"] if len(result["classes"]) > 1 else {}
    return {**classes, "all": result}


def notes(result: dict[str, Any]) -> list[str]:
    """Warnings and errors that a reader should not overlook."""
    stages = result["stages"] if result["kind"] == "sweep" else [result]
    found = ["The run was interrupted; these are the results so far."] if result["interrupted"] else []
    if any(not stage["tokens_counted"] for stage in stages):
        found.append("The server gave no usage: tokens are counted as chunks with text.")
    late = [s["latency_ms"]["client_queue_time"]["percentiles"].get("99") for s in stages if not s["max_concurrency"]]
    if any(value is not None and value > LATE_MS for value in late):
        found.append(
            f"The client was more than {LATE_MS:g} ms late at p99: it was too busy for this load, "
            "and the latencies include its own delay."
        )
    messages = sum((Counter(stage["error_messages"]) for stage in stages), Counter())
    return found + [f"{count} x {message}" for message, count in messages.most_common(5)]


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The result in a sentence or two."""
    if result["kind"] == "sweep":
        objectives = any(stage["goodput"] for stage in result["stages"])
        lines = [f"{'Goodput' if objectives else 'Throughput'} is highest at {result['knee_rps']:g} req/s."]
        if result["saturation_rps"] is not None:
            lines.insert(0, f"At saturation the server completes {number(result['saturation_rps'])} req/s.")
        if objectives:
            capacity = result["capacity_rps"]
            reached = "at none of these loads" if capacity is None else f"up to {capacity:g} req/s"
            lines.append(f"At least {100 * result['wanted_attainment']:g}% of requests are good {reached}.")
        return lines
    lines = [
        f"{result['completed']} of {result['sent']} requests completed in {number(result['duration'])} s: "
        f"{number(result['request_throughput'])} req/s, {number(result['output_throughput'])} tokens/s, "
        f"at most {result['max_concurrent_requests']} in flight."
    ]
    if result["goodput"]:
        good = result["goodput"]
        lines.append(f"Goodput {number(good['request_goodput'])} req/s ({share(good['attainment'])} of requests good).")
    return lines


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Print a result."""
    console = console or terminal()
    for line in summary_lines(result):
        console.print(line, markup=False, soft_wrap=True)
    if result["kind"] == "run":
        print_table(console, "Latency", *latency_rows(result))
    title = "Loads" if result["kind"] == "sweep" else "Traffic"
    head, rows = class_rows(stage_groups(result))
    # Transposed: there are fewer groups than metrics, and a terminal is narrow.
    print_table(console, title, ["", *(row[0] for row in rows)], list(zip(head, *rows, strict=True))[1:])
    for note in notes(result):
        console.print(note, markup=False, soft_wrap=True)


def terminal() -> Console:
    """Console on standard output, which replaces what its encoding lacks."""
    out = sys.stdout
    if isinstance(out, TextIOWrapper):
        out.reconfigure(errors="replace")
    return Console(file=out or StringIO(), highlight=False, width=None if out and out.isatty() else WIDTH)


def print_table(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, in parts below each other if it is too wide: each has the first column and some of the others."""
    widths = [
        min(WIDEST[min(i, 1)], max(map(cell_len, column))) + 2 for i, column in enumerate(zip(head, *rows, strict=True))
    ]
    start = 1
    while start == 1 or start < len(head):
        end = start + 1
        while end < len(head) and widths[0] + sum(widths[start : end + 1]) <= console.width - 2:
            end += 1
        columns = [0, *range(start, min(end, len(head)))]
        console.print(_table(title, [[row[i] for i in columns] for row in (head, *rows)]))
        title, start = "", end


def _table(title: str, lines: Sequence[Sequence[str]]) -> Table:
    """A rich table, its first line being the head, with numbers right-aligned. Cells are text and not rich's markup."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for i, name in enumerate(lines[0]):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold", max_width=WIDEST[min(i, 1)])
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    return table
