"""One HTML page for a result: metrics, plots and tables, which loads nothing from anywhere else."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from guiderail.loadtest.load.runner import Run
from guiderail.loadtest.report import run_plots as plots
from guiderail.loadtest.report import sweep_plots as plots_sweep
from guiderail.loadtest.report.plot_parts import Plot
from guiderail.loadtest.report.table import class_rows, latency_rows, notes, number, share, stage_groups, summary_lines

SETTINGS = (
    "label", "model_id", "base_url", "endpoint", "request_rate", "burstiness", "max_concurrency", "ramp_up_strategy",
    "ramp_up_start_rps", "ramp_up_end_rps", "num_prompts", "seed", "slos_ms", "prompts", "wanted_attainment",
)  # fmt: skip


def page(result: dict[str, Any], runs: Sequence[Run]) -> str:
    """The report of a result and the runs it came from (session.measure gives both)."""
    if result["kind"] == "sweep":
        drawn = [
            plots_sweep.latency_against_load(result),
            plots_sweep.goodput_knee(result),
            plots.reward_against_latency(runs),
            plots_sweep.reward_against_load(result),
            plots.outcomes_over_time(runs),
            plots_sweep.outcomes_against_load(result),
            plots.where_it_went(runs),
        ]
        tables = [("Loads", *class_rows(stage_groups(result)))]
    else:
        drawn = [
            plots.latency_over_time(runs[0]),
            plots.latency_curve(runs[0]),
            plots.reward_against_latency(runs),
            plots.outcomes_over_time(runs),
            plots.where_it_went(runs),
        ]
        tables = [("Traffic", *class_rows(stage_groups(result))), ("Latency", *latency_rows(result))]
    about = f"{result['model_id']} at {result['base_url']}, {result['date']}"
    lead = [f'<p class="lead">{escape(line)}</p>' for line in summary_lines(result)]
    lead += [f'<p class="note">{escape(line)}</p>' for line in notes(result)]
    settings = {key: result[key] for key in SETTINGS if result.get(key) is not None}
    return _fill(
        title=f"Load test: {result['label']}",
        about=about,
        lead="\n".join(lead),
        tiles=_tiles(result),
        plots="\n".join(map(_section, drawn)),
        tables="\n".join(_table(*table) for table in tables) + _preformatted("Settings", settings),
    )


def comparison_page(
    names: tuple[str, str], differences: Sequence[str], table: tuple[Sequence[str], Sequence[Sequence[str]]]
) -> str:
    """The page of a comparison of two results."""
    return _fill(
        title="Load tests compared",
        about=f"a: {names[0]}; b: {names[1]}",
        lead="\n".join(f'<p class="note">differs in {escape(line)}</p>' for line in differences),
        tiles="",
        plots="",
        tables=_table("b as a multiple of a", *table),
    )


def _fill(**parts: str) -> str:
    template = Template((files("guiderail.loadtest.report") / "page.html").read_text("utf-8"))
    return template.substitute(parts | {key: escape(parts[key]) for key in ("title", "about")})


def _tiles(result: dict[str, Any]) -> str:
    if result["kind"] == "sweep":
        tiles = [("knee (req/s)", f"{result['knee_rps']:g}")]
        if result["capacity_rps"] is not None:
            good = f"{100 * result['wanted_attainment']:g}% good up to (req/s)"
            tiles.append((good, f"{result['capacity_rps']:g}"))
        if result["saturation_rps"] is not None:
            tiles.append(("saturation (req/s)", number(result["saturation_rps"])))
        best = max(result["stages"], key=lambda stage: stage["output_throughput"])
        tiles.append(("highest tokens/s", number(best["output_throughput"])))
        return _tile_row(tiles)
    latency, outcomes = result["latency_ms"], result["outcomes"]
    failed = result["failed"]
    tiles = [
        (f"completed of {result['sent']:,}", f"{outcomes['completed']:,}"),
        ("failed, 429 included", str(failed)),
        ("requests/s", number(result["request_throughput"])),
        ("tokens/s", number(result["output_throughput"])),
        ("TTFT p50 (ms)", number(latency["ttft"]["median"])),
        ("TTFT p99 (ms)", number(latency["ttft"]["percentiles"].get("99"))),
        ("E2E p99 (ms)", number(latency["e2el"]["percentiles"].get("99"))),
    ]
    if result["goodput"]:
        tiles.append(("good requests", share(result["goodput"]["attainment"])))
    if result["reward"]:
        tiles.append(("mean reward", number(result["reward"]["score"]["mean"])))
        tiles.append(("reward per second", number(result["reward"]["per_s"])))
    return _tile_row(tiles)


def _tile_row(tiles: Sequence[tuple[str, str]]) -> str:
    cells = (f"<b>{escape(value)}</b><span>{escape(name)}</span>" for name, value in tiles)
    return '<div class="tiles">' + "".join(f'<div class="tile">{cell}</div>' for cell in cells) + "</div>"


def _section(plot: Plot) -> str:
    body = plot.svg or f'<p class="missing">Not drawn: {escape(plot.missing)}.</p>'
    return (
        f'<section id="{plot.key}" aria-label="{escape(plot.title)}"><h2>{escape(plot.title)}</h2>'
        f"<p>{escape(plot.caption)}</p>{body}</section>"
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<section class="wide"><h2>{escape(title)}</h2>'
        f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></section>"
    )


def _preformatted(title: str, value: object) -> str:
    text = escape(json.dumps(value, indent=1))
    return f'<section class="wide"><details><summary>{escape(title)}</summary><pre>{text}</pre></details></section>'
