"""Effects of 16 bits and of the batch on answers: `make bench-numerics`. Writes two sections of BENCHMARKS.md.

logits      over 1,000 positions (the greedy answers of a float32 engine, forced on each engine in turn): ties among
            the five likeliest tokens, error of their log-probabilities against float32, greedy agreement, tokens/s
invariance  thirty seeded requests of ten guides (tests/support/seeded.py), alone, again, and beside each other, in
            each mode; and what the batch-invariant mode costs, in pairs of the same work in both modes
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from bench_server import messages
from report import write_section
from seeded import KINDS, answers, requests
from serving import serving

from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.registry import load_guides, load_rewards
from guiderail.guides.core.types import Message, SamplingSpec, TokenPrompt
from guiderail.server.engines.vllm.engine import build
from guiderail.server.engines.vllm.engine_args import EngineSettings
from guiderail.server.engines.vllm.params import FORCED
from guiderail.server.metrics import Metrics
from guiderail.server.models import catalogue
from guiderail.server.models.renderer import ChatRenderer
from guiderail.server.runtime import assemble, start_rewards
from guiderail.server.settings import OperatorLimits, Settings

ROWS, TOKENS, TOP = 20, 50, 20
MODES: dict[str, dict[str, Any]] = {  # of the logits section
    "float32": {"dtype": "float32"},
    "bfloat16, logits in bfloat16": {"dtype": "bfloat16", "float32_logits": False},
    "bfloat16, logits in float32": {"dtype": "bfloat16"},
}


def model() -> str:
    return catalogue.resolve(catalogue.DEFAULT_MODEL, Settings().cache)


async def forced(engine: Any, prompts: list[TokenPrompt], answers: list[list[int]]) -> tuple[list[Any], float]:
    """TokenLogprob of every position of `answers`, forced after `prompts`, all at once; and tokens/s."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def one(prompt: TokenPrompt, answer: list[int]) -> list[Any]:
        params = SamplingParams(
            max_tokens=len(answer), temperature=0, logprobs=TOP, ignore_eos=True, detokenize=False,
            extra_args={FORCED: answer}, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        (found,) = await engine._logprobs([(prompt, params)], 1)
        return list(found)

    await asyncio.gather(
        *(one(prompt, answer[:2]) for prompt, answer in zip(prompts, answers, strict=True))
    )  # warms up
    began = time.perf_counter()
    found = await asyncio.gather(*(one(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)))
    return [place for row in found for place in row], sum(map(len, answers)) / (time.perf_counter() - began)


async def logits() -> None:
    """The section on logits."""
    render = ChatRenderer(model()).render
    prompts = [
        TokenPrompt(render([Message(m["role"], m["content"]) for m in messages(i)]).token_ids) for i in range(ROWS)
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    places: dict[str, list[Any]] = {}
    speed: dict[str, float] = {}
    for mode, settings in MODES.items():
        engine = await build(EngineSettings(model=model(), max_model_len=512, kv_cache_gb=0.5, **settings))
        try:
            if not places:
                async with engine.generate(prompts, SamplingSpec(TOKENS, 0.0, ignore_eos=True)) as rollouts:
                    async for delta in rollouts:
                        answers[delta.row] += delta.token_ids
            places[mode], speed[mode] = await forced(engine, prompts, answers)
        finally:
            await engine.close()
        print(mode, f"{speed[mode]:.1f} tokens/s", file=sys.stderr)
    truth = [dict(place.top) for place in places["float32"]]
    lines = [
        f"{len(truth)} positions, {ROWS} sequences at once; log-probabilities of the five likeliest tokens.",
        "",
        "| engine | positions with a tie in the top 5 | mean error of a log-probability | largest | greedy as in float32 "
        "| tokens/s | to bfloat16 logits |",
        "|---|---|---|---|---|---|---|",
    ]
    data: dict[str, Any] = {}
    for mode, found in places.items():
        tops = [place.top[:5] for place in found]
        ties = sum(len({value for _, value in top}) < 5 for top in tops)
        errors = [abs(value - true[t]) for top, true in zip(tops, truth, strict=True) for t, value in top if t in true]
        same = np.mean([top[0][0] == max(true, key=true.__getitem__) for top, true in zip(tops, truth, strict=True)])
        ratio = speed[mode] / speed["bfloat16, logits in bfloat16"]
        lines.append(
            f"| {mode} | {ties} | {np.mean(errors):.4f} | {max(errors):.3f} | {same:.1%} | {speed[mode]:.1f} | {ratio:.2f} |"
        )
        data[mode] = {
            "ties": ties, "mean_error": float(np.mean(errors)), "largest_error": max(errors), "greedy": float(same),
            "tokens_per_s": speed[mode],
        }  # fmt: skip
    write_section("logits", "Logits in float32", "make bench-numerics", lines, data)


async def served(invariant: bool, dtype: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Answers of the thirty requests and seconds of `rounds` best-of-16, on an engine of its own."""
    engine = await build(
        EngineSettings(model=model(), dtype=dtype, max_model_len=512, kv_cache_gb=0.5, batch_invariant=invariant)
    )
    try:
        settings, renderer = Settings(batch_invariant=invariant, limits=OperatorLimits()), ChatRenderer(model())
        services = Services(engine, renderer, frozenset(), settings.model_name)
        rewards = {name: cls() for name, cls in load_rewards().items()}
        await start_rewards(rewards, services)
        metrics = Metrics(settings.model_name)
        state = assemble(settings, engine, renderer, load_guides(), rewards, services, metrics)
        async with serving(state) as url, httpx.AsyncClient(base_url=url, timeout=600) as client:
            seconds = []
            for i in range(-1, rounds):
                began = time.perf_counter()
                alignment = {"guide": {"name": "best_of_n", "n": 16}, "rewards": ["length"]}
                body = {"messages": messages(i + 1), "max_tokens": 48, "ignore_eos": True, "alignment": alignment}
                (await client.post("/v1/chat/completions", json=body)).raise_for_status()
                seconds.append(time.perf_counter() - began)
            found = await answers(client, [body for _, body in requests(tokens)])
        return found | {"seconds": seconds[1:]}
    finally:
        await engine.close()


async def invariance(dtypes: list[str], tokens: int, rounds: int) -> None:
    """The section on how far a seed repeats answers."""
    lines = [
        f"Thirty seeded requests, three of each of ten guides, {tokens} tokens: how many gave the same answer as "
        "alone. Best of 16 x 48 tokens by `length`: median seconds, and their ratio to the fast mode in float32.",
        "",
        "| mode | again alone | beside the others and 8 strangers | not alike | best of 16 | ratio |",
        "|---|---|---|---|---|---|",
    ]
    data: dict[str, Any] = {}
    kinds = [kind for kind, _ in requests(tokens)]
    for dtype, invariant in [("float32", False), ("float32", True), *((other, False) for other in dtypes)]:
        got = await served(invariant, dtype, tokens, rounds)
        alike = {how: [a == b for a, b in zip(got["alone"], got[how], strict=True)] for how in ("again", "beside")}
        unlike = Counter(kind for same in alike.values() for kind, one in zip(kinds, same, strict=True) if not one)
        mode = f"{dtype}, {'batch-invariant' if invariant else 'fast'}"
        seconds = statistics.median(got["seconds"])
        data[mode] = {how: sum(same) for how, same in alike.items()} | {"seconds": got["seconds"]}
        ratio = seconds / statistics.median(data["float32, fast"]["seconds"])
        lines.append(
            f"| {mode} | {sum(alike['again'])} of 30 | {sum(alike['beside'])} of 30 | {', '.join(unlike) or 'none'} "
            f"| {seconds:.2f} s | {ratio:.2f} |"
        )
        print(lines[-1], file=sys.stderr)
    assert len(KINDS) == 10
    write_section("invariance", "Repeatability with a seed", "make bench-numerics", lines, data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=["logits", "invariance"], help="one of the two sections (both)")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"], help="beside float32, in the fast mode")
    parser.add_argument("--tokens", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    if given.part != "invariance":
        asyncio.run(logits())
    if given.part != "logits":
        asyncio.run(invariance(given.dtypes, given.tokens, given.rounds))
