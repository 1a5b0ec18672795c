"""`guiderail loadtest compare a.json b.json`: b as a multiple of a."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guiderail.loadtest.load.text_file import parse_json, read_text
from guiderail.loadtest.loadtest_error import LoadtestError
from guiderail.loadtest.report.table import number, print_table, terminal

SETTINGS = (
    "model_id", "base_url", "endpoint", "seed", "num_prompts", "request_rate", "burstiness", "max_concurrency",
    "slos_ms", "prompts",
)  # fmt: skip
LATENCIES = {
    "ttft": ("50", "90", "99", "99.9"),
    "tpot": ("50", "99"),
    "itl": ("50", "99"),
    "e2el": ("50", "90", "99", "99.9"),
    "e2el_from_send": ("99",),
    "server_queue_time": ("50", "99"),
}
PART_LATENCIES = {"ttft": ("50", "99"), "e2el": ("50", "99")}  # of a class or a stage

Row = tuple[str, float | None, float | None]


def load(path: Path) -> dict[str, Any]:
    """A saved result. Raises LoadtestError if the file is not one."""
    try:
        result: Any = parse_json(read_text(path, "result"))
    except ValueError as error:
        raise LoadtestError(f"{path}: {error}") from error
    if not isinstance(result, dict) or result.get("kind") not in ("run", "sweep"):
        raise LoadtestError(f"{path}: not a result of guiderail loadtest")
    return result


def rows(a: dict[str, Any], b: dict[str, Any]) -> list[Row]:
    """Name and both values of every metric that either has. Raises LoadtestError if there is nothing to compare.

    Sweeps are compared at the rates that both ran; classes, by name.
    """
    if a["kind"] != b["kind"]:
        raise LoadtestError(f"a {a['kind']} and a {b['kind']} cannot be compared")
    if a["kind"] == "run":
        found = [*_group("", a, b)]
        shared = [name for name in a["classes"] if name in b["classes"]] if len(a["classes"]) > 1 else []
        for name in shared:
            found += _group(f"{name}: ", a["classes"][name], b["classes"][name])
        return found
    found = [
        ("saturation (req/s)", a["saturation_rps"], b["saturation_rps"]),
        ("capacity (req/s)", a["capacity_rps"], b["capacity_rps"]),
        ("knee (req/s)", a["knee_rps"], b["knee_rps"]),
    ]
    there = {stage["request_rate"]: stage for stage in b["stages"]}
    for stage in a["stages"]:
        rate = stage["request_rate"]
        if rate in there:
            found += _group(f"at {rate:g} req/s: ", stage, there[rate])
    return [row for row in found if row[1:] != (None, None)]


def _group(prefix: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[Row]:
    def of(group: dict[str, Any], *path: str) -> Any:
        value: Any = group
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    metrics = [("sent", ("sent",)), ("completed", ("outcomes", "completed")), ("429", ("outcomes", "rejected_429"))]
    metrics += [(key, ("outcomes", key)) for key in ("http_error", "connection_error", "stream_error", "timeout")]
    metrics += [
        ("throughput (req/s)", ("request_throughput",)),
        ("output (tok/s)", ("output_throughput",)),
        ("goodput (req/s)", ("goodput", "request_goodput")),
        ("good requests (share)", ("goodput", "attainment")),
    ]
    for name, ranks in (PART_LATENCIES if prefix else LATENCIES).items():
        metrics.append((f"{name} mean (ms)", ("latency_ms", name, "mean")))
        metrics += [(f"{name} p{rank} (ms)", ("latency_ms", name, "percentiles", rank)) for rank in ranks]
    metrics += [
        ("reward mean", ("reward", "score", "mean")),
        ("reward per second", ("reward", "per_s")),
        ("reward per second of latency", ("reward", "per_latency_s")),
        ("discarded tokens (share)", ("spend", "discarded_share")),
        ("scoring time (share)", ("spend", "scoring_share")),
    ]
    for name, path in metrics:
        pair = of(a, *path), of(b, *path)
        if pair not in ((None, None), (0, 0)):
            yield (prefix + name, *pair)


def ratio(a: float | None, b: float | None) -> str:
    """b / a as text. A dash where a value is negative or absent, as no ratio has a meaning there."""
    if a is None or b is None or a <= 0 or b < 0:
        return "-"
    return f"{b / a:.3f}"


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Settings in which the two differ, and on which the meaning of every ratio depends."""
    return [f"{key}: {a.get(key)} against {b.get(key)}" for key in SETTINGS if a.get(key) != b.get(key)]


def as_rows(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table."""
    return ["", "a", "b", "b / a"], [[name, number(x), number(y), ratio(x, y)] for name, x, y in found]


def compare(a: Path, b: Path, html: Path | None) -> None:
    """Print the comparison of two saved results, and write it to `html` if that is given."""
    results = load(a), load(b)
    found = rows(*results)
    saved = None
    if html is not None:
        from guiderail.loadtest.report.page import comparison_page
        from guiderail.loadtest.report.saving import save

        saved = save(html, comparison_page((a.name, b.name), differences(*results), as_rows(found)))
    console = terminal()
    console.print(f"a: {a}\nb: {b}", markup=False, soft_wrap=True)
    for line in differences(*results):
        console.print(f"differs in {line}", markup=False, soft_wrap=True)
    print_table(console, "Comparison", *as_rows(found))
    if saved is not None:
        console.print(f"saved {saved}", markup=False, soft_wrap=True)
