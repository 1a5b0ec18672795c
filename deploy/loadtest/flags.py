"""The flags of `guiderail loadtest`. Names and meanings are those of `vllm bench serve` where it has them."""

import argparse
import math
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guiderail.loadtest.loadtest_error import LoadtestError

if TYPE_CHECKING:
    from guiderail.loadtest.client.session import Options
    from guiderail.loadtest.load.runner import Load
    from guiderail.loadtest.load.sweep import Sweep

ENDPOINTS = {"openai-chat": "/v1/chat/completions", "openai": "/v1/completions", "vllm": "/v1/completions"}
SAMPLING: dict[str, type] = {
    "temperature": float, "top-p": float, "top-k": int, "min-p": float,
    "frequency-penalty": float, "presence-penalty": float, "repetition-penalty": float,
}  # fmt: skip
SLOS = ("ttft", "tpot", "e2el")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run."""
    add = parser.add_argument_group("server").add_argument
    add("--base-url", metavar="URL", help="server to test (http://HOST:PORT)")
    add("--host", default="127.0.0.1", help="host, if there is no --base-url (127.0.0.1)")
    add("--port", type=int, default=8000, help="port, if there is no --base-url (8000)")
    add(
        "--backend",
        choices=ENDPOINTS,
        default="openai-chat",
        help="chat or text completions (openai-chat)",
    )
    add("--endpoint", metavar="PATH", help="path of the endpoint (default: that of --backend)")
    add("--model", help="model to ask for (default: the first that the server lists)")
    add("--api-key", metavar="KEY", help="bearer key (default: $OPENAI_API_KEY)")
    add("--header", metavar="KEY=VALUE", nargs="*", default=[], help="headers to send with every request")
    add("--insecure", action="store_true", help="do not check TLS certificates")
    add(
        "--request-timeout",
        type=float,
        default=600,
        metavar="S",
        help="seconds until a request is abandoned (600)",
    )
    add(
        "--ready-check-timeout-sec",
        type=float,
        default=0,
        metavar="S",
        help="seconds to wait for the server (0)",
    )
    add("--request-id-prefix", metavar="TEXT", help="prefix of X-Request-Id, before the request's number")

    add = parser.add_argument_group("arrivals").add_argument
    add("--request-rate", type=float, default=math.inf, metavar="RPS", help="requests/s; inf: no schedule (inf)")
    add("--burstiness", type=float, default=1.0, metavar="X", help="1 Poisson, <1 burstier, inf constant gaps (1)")
    add(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="most in flight; without a rate: N users, closed loop",
    )
    add("--num-prompts", type=int, metavar="N", help="requests to send (1000, or as many as --duration allows)")
    add("--duration", type=float, metavar="S", help="seconds to send for; requests in flight at the end are awaited")
    add("--num-warmups", type=int, default=0, metavar="N", help="unmeasured requests sent first (0)")
    add("--ramp-up-strategy", choices=("linear", "exponential"), help="change the rate over the run")
    add("--ramp-up-start-rps", type=float, metavar="RPS", help="rate at the start of the ramp")
    add("--ramp-up-end-rps", type=float, metavar="RPS", help="rate at the end of the ramp")
    add("--sweep-rates", metavar="auto|A,B,...", help="saturation sweep: one run at each rate; auto finds them")
    add("--sweep-users", type=int, default=64, metavar="N", help="closed-loop users to find saturation with (64)")
    add("--sweep-attainment", type=float, default=0.95, metavar="SHARE", help="share of good requests wanted (0.95)")
    add("--seed", type=int, default=0, help="seed of arrivals, classes, prompts and cancellations (0)")

    add = parser.add_argument_group("requests").add_argument
    add("--traffic", metavar="FILE.yaml", help="classes of requests and their shares (see the README)")
    add("--dataset-path", metavar="FILE", help="prompts: .jsonl, or one per line (default: the built-in ones)")
    add("--unique-prompts", action="store_true", help="number every prompt, so that no prefix cache has it")
    add("--output-len", type=int, default=128, metavar="N", help="max_tokens of each request (128)")
    add("--ignore-eos", action="store_true", help="ask for answers of full length")
    add(
        "--extra-body",
        type=_json,
        default={},
        metavar="JSON",
        help='extra fields, such as {"alignment": "upbeat"}',
    )
    for name, kind in SAMPLING.items():
        add(
            f"--{name}",
            type=kind,
            metavar="X",
            help=argparse.SUPPRESS if "penalty" in name else f"{name} of every request",
        )
    add("--cancellation-rate", type=float, default=0.0, metavar="SHARE", help="share of clients that hang up (0)")
    add("--cancel-after-tokens", metavar="A-B", help="hang up after A to B chunks with text (1-16)")
    add("--cancel-after-s", metavar="A-B", help="hang up A to B seconds after the send")

    add = parser.add_argument_group("results").add_argument
    add("--goodput", nargs="+", default=[], metavar="SLO:MS", help=f"objectives, such as ttft:500; {', '.join(SLOS)}")
    add("--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="A,B", help="metrics to include in the flat keys")
    add("--metric-percentiles", default="50,90,95,99,99.9", metavar="P,Q", help="percentiles (50,90,95,99,99.9)")
    add("--label", help="name of the run (default: that of the backend)")
    add("--metadata", metavar="KEY=VALUE", nargs="*", default=[], help="pairs to keep in the result")
    add("--save-result", action="store_true", help="save the result as JSON")
    add("--save-detailed", action="store_true", help="save the JSON with lists of every request's metrics and texts")
    add("--save-requests", action="store_true", help="save a .jsonl with one line per request")
    add("--save-report", action="store_true", help="save an .html report with plots")
    add("--result-dir", metavar="DIR", help="folder to save in (the current folder)")
    add("--result-filename", metavar="NAME", help="name of the JSON; the others have its name too")
    add("--disable-tqdm", action="store_true", help="no progress display")


def options_of(args: argparse.Namespace) -> "Options":
    """The options given by the flags. Raises LoadtestError, which names the flag or field at fault."""
    from guiderail.loadtest.client.session import Options
    from guiderail.loadtest.load import prompts, traffic
    from guiderail.loadtest.load.plan import Requests
    from guiderail.loadtest.report.result import METRICS, QUEUE_INCLUSIVE, Reporting

    base_url = (args.base_url or f"http://{args.host}:{args.port}").rstrip("/").removesuffix("/v1")
    endpoint = args.endpoint or ENDPOINTS[args.backend]
    if not isinstance(args.extra_body, dict):
        raise LoadtestError("--extra-body: expected a JSON object")
    sampling = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in SAMPLING}
    body = {name: value for name, value in sampling.items() if value is not None}
    body |= ({"ignore_eos": True} if args.ignore_eos else {}) | args.extra_body
    slos = _slos(args.goodput)
    requests = Requests(
        base_url=base_url,
        endpoint=endpoint,
        model=args.model or "",
        body=body,
        max_tokens=args.output_len,
        prompts=prompts.load(Path(args.dataset_path)) if args.dataset_path else prompts.shipped(),
        unique_prompts=args.unique_prompts,
        slos=slos,
        cancellation=_cancellation(args),
        id_prefix=args.request_id_prefix or f"loadtest-{uuid.uuid4().hex[:8]}-",
    )
    metrics = args.percentile_metrics.split(",")
    if wrong := set(metrics) - {*METRICS, QUEUE_INCLUSIVE}:
        raise LoadtestError(f"--percentile-metrics: {min(wrong)!r} is none of {', '.join((*METRICS, QUEUE_INCLUSIVE))}")
    about = Reporting(
        label=args.label or args.backend,
        model=args.model or "",
        base_url=base_url,
        endpoint=endpoint,
        seed=args.seed,
        percentile_metrics=metrics,
        percentiles=_numbers(args.metric_percentiles, "--metric-percentiles", 0, 100),
        slos=slos,
        metadata=_pairs(args.metadata, "--metadata"),
    )
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    return Options(
        requests=requests,
        classes=traffic.load(Path(args.traffic)) if args.traffic else [traffic.TrafficClass()],
        load=_load(args),
        about=about,
        sweep=_sweep(args),
        seed=_at_least(args.seed, 0, "--seed"),
        num_warmups=_at_least(args.num_warmups, 0, "--num-warmups"),
        headers=({"Authorization": f"Bearer {key}"} if key else {}) | _pairs(args.header, "--header"),
        timeout_s=args.request_timeout,
        ready_timeout_s=args.ready_check_timeout_sec,
        insecure=args.insecure,
        detailed=args.save_detailed,
    )


def _load(args: argparse.Namespace) -> "Load":
    from guiderail.loadtest.load.arrivals import Ramp
    from guiderail.loadtest.load.runner import Load

    rate: float | Ramp = _positive(args.request_rate, "--request-rate")
    ends = (args.ramp_up_start_rps, args.ramp_up_end_rps)
    if args.ramp_up_strategy:
        if None in ends or rate != math.inf or args.sweep_rates:
            raise LoadtestError(
                "--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps, and neither --request-rate nor "
                "--sweep-rates"
            )
        start, end = (_positive(value, "--ramp-up-*-rps") for value in ends)
        rate = Ramp(args.ramp_up_strategy, start, end)
    elif ends != (None, None):
        raise LoadtestError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
    count, duration = args.num_prompts, args.duration
    if duration is not None:
        _positive(duration, "--duration")
        scheduled = rate != math.inf or args.max_concurrency or args.sweep_rates
        if not scheduled:
            raise LoadtestError("--duration needs --request-rate, --max-concurrency, a ramp or a sweep")
    elif count is None:
        count = 1000
    if count is not None:
        _at_least(count, 1, "--num-prompts")
    if args.max_concurrency is not None:
        _at_least(args.max_concurrency, 1, "--max-concurrency")
    return Load(rate, _positive(args.burstiness, "--burstiness"), args.max_concurrency, count, duration)


def _sweep(args: argparse.Namespace) -> "Sweep | None":
    from guiderail.loadtest.load.sweep import Sweep

    if not args.sweep_rates:
        return None
    if args.request_rate != math.inf:
        raise LoadtestError("--sweep-rates and --request-rate cannot be used together")
    rates = None if args.sweep_rates == "auto" else _numbers(args.sweep_rates, "--sweep-rates", 1e-6, 1e9)
    return Sweep(rates, _at_least(args.sweep_users, 1, "--sweep-users"), args.sweep_attainment)


def _cancellation(args: argparse.Namespace) -> Any:
    from guiderail.loadtest.load.plan import Cancellation

    if not 0 <= args.cancellation_rate <= 1:
        raise LoadtestError("--cancellation-rate: expected a share from 0 to 1")
    chunks, seconds = args.cancel_after_tokens, args.cancel_after_s
    if chunks is None and seconds is None:
        return Cancellation(args.cancellation_rate)
    low, high = _range(chunks, "--cancel-after-tokens") if chunks else (0.0, 0.0)
    return Cancellation(
        args.cancellation_rate,
        (max(1, int(low)), int(high)) if chunks else None,
        _range(seconds, "--cancel-after-s") if seconds else None,
    )


def _json(text: str) -> object:
    from guiderail.loadtest.load.text_file import parse_json

    try:
        return parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error


def _range(text: str, flag: str) -> tuple[float, float]:
    low, dash, high = text.partition("-")
    try:
        ends = float(low), float(high if dash else low)
    except ValueError:
        ends = 1.0, 0.0
    if not 0 <= ends[0] <= ends[1] or ends[1] == 0:
        raise LoadtestError(f"{flag} {text}: expected a range such as 1-16, or one number")
    return ends


def _slos(pairs: list[str]) -> dict[str, float]:
    slos = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            slos[name] = float(value)
        except ValueError:
            slos[name] = -1.0
        if name not in SLOS or slos[name] < 0:
            raise LoadtestError(f"--goodput {pair}: expected NAME:MILLISECONDS, NAME one of {', '.join(SLOS)}")
    return slos


def _pairs(items: list[str], flag: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in items]
    if wrong := [item for item, (name, sign, _) in zip(items, pairs, strict=True) if not (name and sign)]:
        raise LoadtestError(f"{flag} {wrong[0]}: expected KEY=VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _numbers(text: str, flag: str, low: float, high: float) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise LoadtestError(f"{flag} {text}: expected numbers with commas between them") from error
    if not all(low <= value <= high for value in values):
        raise LoadtestError(f"{flag} {text}: expected numbers from {low:g} to {high:g}")
    return values


def _positive(value: float, flag: str) -> float:
    if not value > 0:
        raise LoadtestError(f"{flag}: expected a number above 0")
    return value


def _at_least(value: int, low: int, flag: str) -> int:
    if value < low:
        raise LoadtestError(f"{flag}: expected at least {low}")
    return value
