"""Guiderail under load: `make bench-load` (about 90 minutes on 2 cores; ARGS="--only overload" for a part).

plain      Guiderail against `vllm serve` (same version, model and settings), both up, taking turns at three loads
mixed      plain chats beside best-of-8 and Transfer Q*, at 0.7 of what saturates the mix, against plain chats alone
overload   5 times the saturating load for two minutes: refusals, deadlines, memory, and service afterwards
chaos      ten minutes of mixed traffic, a tenth of the clients hanging up, the engine killed in the middle

Every load comes from `guiderail loadtest` in a process of its own; client times count from the scheduled send.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from load_servers import Server, guiderail, vllm
from load_turns import Stalls, Turn, table, targets
from measured import verdict
from report import Results, Target, write_section

PLAIN = {"name": "plain", "share": 70, "max_tokens": 64}
BEST = {
    "name": "best_of_8",
    "share": 20,
    "max_tokens": 64,
    "alignment": {"guide": {"name": "best_of_n", "n": 8}, "rewards": ["sentiment"]},
}
SEARCH = {
    "name": "transfer_q",
    "share": 10,
    "max_tokens": 16,
    "alignment": {"guide": {"name": "transfer_q", "top_k": 5, "lookahead": 8}, "rewards": ["sentiment"]},
}
MIX = [PLAIN, BEST, SEARCH]
ROUNDS = 6
LOADS = (0.3, 0.6, 0.9)
STARTS = {"vllm": vllm, "ours": guiderail}


def loadtest(server: Server, folder: Path, classes: list[dict[str, Any]], *flags: str) -> dict[str, Any]:
    """Run `guiderail loadtest` against a server; return its JSON."""
    traffic = folder / "traffic.yaml"
    traffic.write_text(json.dumps({"classes": classes}))  # JSON is YAML
    result = folder / f"result-{time.monotonic_ns()}.json"
    command = [
        str(Path(sys.executable).with_name("guiderail")), "loadtest", "--base-url", server.url, "--traffic",
        str(traffic), "--unique-prompts", "--disable-tqdm", "--save-result", "--result-dir", str(folder),
        "--result-filename", result.name, "--ignore-eos", *flags,
    ]  # fmt: skip
    process = psutil.Popen(command, stdout=-3)
    if process.wait() != 0 or not result.exists():
        raise SystemExit(f"loadtest failed: {' '.join(command)}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def p99_ttft(result: dict[str, Any], kind: str) -> float:
    """Milliseconds."""
    value: float = result["classes"][kind]["latency_ms"]["ttft"]["percentiles"]["99"]
    return value


def plain(folder: Path, seconds: float, rounds: int) -> Results:
    """Throughput and p99 TTFT of plain chats, Guiderail over `vllm serve`, at three loads."""
    turns: dict[float, dict[str, list[Turn]]] = {load: {"vllm": [], "ours": []} for load in LOADS}
    saturations = []
    closed_loop = ("--max-concurrency", "64", "--num-prompts", "192")
    for number in range(rounds):
        (logs := folder / f"round-{number}").mkdir(exist_ok=True)
        order = ("vllm", "ours") if number % 2 == 0 else ("ours", "vllm")
        # Two processes of one server differ by up to a tenth for as long as they live, by the placement of their memory:
        # one pair for all turns would be compared by luck.
        with ExitStack() as stack:
            servers = {name: stack.enter_context(STARTS[name](logs)) for name in order}
            for server in servers.values():
                loadtest(server, folder, [PLAIN], *closed_loop, "--seed", "1000")
            # In every round, as the machine's speed drifts: 0.9 of its throughput an hour ago may saturate it now.
            full = loadtest(servers["vllm"], folder, [PLAIN], *closed_loop, "--seed", str(2000 + number))
            saturations.append(full["request_throughput"])
            for place, load in enumerate(LOADS):
                lasts = seconds * 0.9 / load  # the same number of requests at each load, so that p99s compare
                flags = ("--request-rate", f"{load * saturations[-1]:.3f}", "--duration", f"{lasts:.0f}")
                seed = str(number * len(LOADS) + place)
                for name in order:
                    time.sleep(2)  # the other server's idle processes poll for a second
                    with Stalls() as stalls:
                        result = loadtest(servers[name], folder, [PLAIN], *flags, "--seed", seed, "--save-detailed")
                    turns[load][name].append(Turn.of(result, stalls.longest_ms))
    saturation = statistics.mean(saturations)
    lines = [
        f"Plain chats of 64 tokens, Poisson arrivals, {rounds} pairs of servers, freshly started and warmed, each taking turns of about {0.9 * seconds * saturation:.0f} "
        f"requests at each load. Saturation, measured in each round by a closed loop of 64 users at `vllm serve`: "
        f"{min(saturations):.2f} to {max(saturations):.2f} requests/s. Ratios are over all turns' requests together, with the "
        "95% interval of a bootstrap of pairs of turns.",
        "",
        *table(turns),
    ]
    kept = {str(load): {name: [t.summary() for t in each] for name, each in by.items()} for load, by in turns.items()}
    return lines, {"saturations_rps": saturations, "turns": kept}, targets(turns)


def mixed(folder: Path, seconds: float) -> Results:
    """The effect of the mix on plain chats: their p99 TTFT at 0.7 of the mix's saturation over theirs alone."""
    with guiderail(folder) as ours:
        full = loadtest(ours, folder, MIX, "--max-concurrency", "32", "--num-prompts", "120")
        rate = 0.7 * full["request_throughput"]
        together, alone = [], []
        for turn in range(3):
            flags = ("--duration", f"{seconds:g}", "--seed", str(turn), "--num-warmups", "4")
            alone.append(loadtest(ours, folder, [PLAIN], "--request-rate", f"{0.7 * rate:.3f}", *flags))
            together.append(loadtest(ours, folder, MIX, "--request-rate", f"{rate:.3f}", *flags))
        pairs = [(p99_ttft(t, "plain"), p99_ttft(a, "plain")) for t, a in zip(together, alone, strict=True)]
        ratios = sorted(mix / single for mix, single in pairs)
    value = statistics.median(ratios)
    lines = [
        f"Mix: 70% plain (64 tokens), 20% best-of-8 x 64, 10% Transfer Q* (k 5, lookahead 8, 16 tokens). It saturates at "
        f"{full['request_throughput']:.2f} requests/s (closed loop, 32 users); run at 0.7 of that, 3 x {seconds:g} s.",
        "",
        f"- Plain chats' p99 time to first token, in the mix / alone at the same rate of theirs: **{value:.2f}** "
        f"({ratios[0]:.2f}-{ratios[-1]:.2f}); target <= 2: {verdict(value, 2, at_most=True)}.",
    ]
    for name in ("plain", "best_of_8", "transfer_q"):
        metrics = together[-1]["classes"][name]["latency_ms"]
        lines.append(
            f"- {name}: median TTFT {metrics['ttft']['median']:.0f} ms, p99 {metrics['ttft']['percentiles']['99']:.0f} ms, "
            f"median end-to-end {metrics['e2el']['median']:.0f} ms."
        )
    target = Target("plain chats' p99 TTFT, in the mix / alone", "<= 2", f"{value:.2f}", value <= 2)
    return lines, {"saturation_rps": full["request_throughput"], "p99_ttft_ms_mix_alone": pairs}, [target]


def overload(folder: Path, seconds: float) -> Results:
    """5 times the saturating load: nothing breaks, deadlines hold, the rest is refused quickly."""
    deadline = 10.0
    # Pages of the KV cache count as the process's own once they are written: the first storm must fill all of it.
    flags = ("--max-num-seqs", "64", "--kv-cache-gb", "1")
    bounded = [{**PLAIN, "alignment": {"budget": {"deadline_s": deadline}}}]
    with guiderail(folder, *flags) as ours:
        full = loadtest(ours, folder, bounded, "--max-concurrency", "64", "--num-prompts", "192")
        saturation = full["request_throughput"]
        calm = ("--request-rate", f"{saturation / 2:.3f}", "--duration", "20")
        # A first storm fills what is filled only once (KV cache, allocators' arenas, oneDNN's kernels for every number of
        # sequences in a step); a leak grows with every storm.
        loadtest(ours, folder, bounded, "--request-rate", f"{5 * saturation:.3f}", "--duration", f"{seconds:g}")
        before = loadtest(ours, folder, bounded, *calm)
        memory = ours.memory()
        storm = loadtest(ours, folder, bounded, "--request-rate", f"{5 * saturation:.3f}", "--duration", f"{seconds:g}")
        rows_left = ours.metric("engine_rows")
        after = loadtest(ours, folder, bounded, *calm)
        memory_after = ours.memory()
        alive = httpx.get(f"{ours.url}/health").status_code == 200
    grown = sum(memory_after.values()) / sum(memory.values())
    by_process = {name: memory_after[name] / held for name, held in memory.items() if name in memory_after}
    late = storm["latency_ms"]["e2el_from_send"]["max"] / 1000
    refused = storm["latency_ms"]["rejection"]["percentiles"]["99"]
    outcomes = {key: value for key, value in storm["outcomes"].items() if value}
    again = after["latency_ms"]["ttft"]["median"] / before["latency_ms"]["ttft"]["median"]
    checks = {
        "server alive": alive,
        "only answers and 429": set(outcomes) <= {"completed", "rejected_429"},
        f"answers within their deadline of {deadline:g} s and 0.5 s": late <= deadline + 0.5,
        "sequences left in the engine: 0": rows_left == 0,
        "memory after the second storm at most 1.05 of that after the first": grown <= 1.05,
    }
    lines = [
        f"{5 * saturation:.1f} requests/s (5 x saturation) of plain chats with a deadline of {deadline:g} s for {seconds:g} s: "
        f"{storm['sent']} sent, {outcomes}.",
        "",
        *(f"- {text}: {'yes' if held else '**no**'}" for text, held in checks.items()),
        f"- slowest answer {late:.2f} s after its send; 99% of refusals within {refused:.0f} ms; throughput of answers "
        f"{storm['request_throughput'] / saturation:.2f} of saturation",
        f"- memory after / before {grown:.3f} ({', '.join(f'{k} {v:.3f}' for k, v in by_process.items())}); median TTFT at half load after / before {again:.2f}",
    ]
    data = {
        "checks": checks,
        "outcomes": outcomes,
        "memory": grown,
        "memory_by_process": by_process,
        "ttft_after_before": again,
    }
    return lines, data, [_all_of("overload at 5 times saturation", checks)]


def _all_of(measure: str, checks: dict[str, bool]) -> Target:
    return Target(measure, f"{len(checks)} checks", f"{sum(checks.values())} hold", all(checks.values()))


def chaos(folder: Path, seconds: float) -> Results:
    """Mixed traffic with clients that hang up and an engine that dies: every request is answered, and counts agree."""
    with guiderail(folder) as ours:
        full = loadtest(ours, folder, MIX, "--max-concurrency", "16", "--num-prompts", "60")
        before = ours.outcomes()
        rate = 0.5 * full["request_throughput"]
        ours.kill_engine_after(seconds / 2)
        result = loadtest(
            ours, folder, MIX, "--request-rate", f"{rate:.3f}", "--duration", f"{seconds:g}",
            "--cancellation-rate", "0.1", "--cancel-after-tokens", "1-8", "--cancel-after-s", "0.2-3",
        )  # fmt: skip
        time.sleep(3)
        told = {key: value - before.get(key, 0) for key, value in ours.outcomes().items()}
        running = ours.metric("num_requests_running")
        rows = ours.metric("engine_rows")
        restarts = ours.metric("engine_restarts_total")
    seen = result["outcomes"]
    errors = sum(v for k, v in seen.items() if k in ("http_error", "stream_error"))
    unclear = seen.get("connection_error", 0) + seen.get("timeout", 0)
    # A client may have hung up after the server had finished: these two are compared as one.
    sums = {
        "sent": (result["sent"], sum(told.values())),
        "answered, or given up by the client": (
            seen["completed"] + seen["cancelled"], told.get("success", 0) + told.get("cancelled", 0)
        ),
        "errors": (errors, told.get("error", 0) + told.get("rejected", 0)),
        "refused with 429": (seen.get("rejected_429", 0), told.get("overloaded", 0)),
    }  # fmt: skip
    checks = {
        "every request ended in an answer, a clear error or the client's own hanging up": unclear == 0,
        "client and /metrics agree on every count": all(a == b for a, b in sums.values()),
        "the engine was started again once": restarts == 1,
        "nothing is left running": running == 0 and rows == 0,
    }
    lines = [
        f"{seconds / 60:g} minutes of the mix at {rate:.2f} requests/s, 10% of the clients hanging up, the engine's process "
        f"killed in the middle: { ({k: v for k, v in seen.items() if v}) }.",
        "",
        *(f"- {text}: {'yes' if held else '**no**'}" for text, held in checks.items()),
        "",
        "| | client | /metrics |",
        "|---|---|---|",
        *(f"| {name} | {a} | {b:g} |" for name, (a, b) in sums.items()),
        "",
        f"Errors that clients saw: {result['error_messages'] or 'none'}.",
    ]
    data = {"checks": checks, "client": seen, "metrics": told}
    return lines, data, [_all_of("mixed traffic with hang-ups and a killed engine", checks)]


def main() -> None:
    """Run the parts and write a section for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("plain", "mixed", "overload", "chaos"))
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all durations; below 1 is a rehearsal")
    parser.add_argument("--keep", type=Path, help="folder for the results of every loadtest and the servers' logs")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of the plain comparison ({ROUNDS})")
    args = parser.parse_args()
    parts: dict[str, tuple[str, Callable[[Path], Results]]] = {
        "plain": ("Plain load against vllm serve", lambda f: plain(f, 30 * args.scale, args.rounds)),
        "mixed": ("Mixed load", lambda f: mixed(f, 100 * args.scale)),
        "overload": ("Overload", lambda f: overload(f, 120 * args.scale)),
        "chaos": ("Chaos", lambda f: chaos(f, 600 * args.scale)),
    }
    for key, (title, part) in parts.items():
        if args.only in (None, key):
            with tempfile.TemporaryDirectory() as folder:
                results = args.keep.resolve() / key if args.keep else Path(folder)
                results.mkdir(parents=True, exist_ok=True)
                lines, data, wanted = part(results)
            flags = []
            if args.scale != 1:
                flags.append(f"--scale {args.scale:g}")
            if key == "plain" and args.rounds != ROUNDS:
                flags.append(f"--rounds {args.rounds}")
            command = f'make bench-load ARGS="{" ".join(flags)}"' if flags else "make bench-load"
            write_section(f"load_{key}", title, command, lines, data, wanted)


if __name__ == "__main__":
    main()
