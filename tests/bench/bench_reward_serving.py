"""A reward model at work in the server: part of `make bench-scoring`.

best_of_16   best of 16 x 64 tokens with the packed reward model, against raw vLLM generating 16 x 64
batching     8 requests of 8 candidates: their calls of the scorer at once, against the same calls one by one
latency      inter-token latency of a plain chat, alone and while large batches are scored
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from bench_scoring import apart, draw, model_folder
from bench_server import Raw, Served, messages
from report import Target, write_section

from guiderail.server.models.cpu_features import auto_dtype


async def batching(folder: str, rounds: int) -> list[tuple[float, float]]:
    """(one by one, at once) seconds for 8 requests x 8 calls of one candidate each, 64 tokens after 64."""
    from transformers import AutoTokenizer

    from guiderail.guides.core.types import PROMPT, Answer, Message, ScoreGroup, TokenPrompt
    from guiderail.server.metrics import Metrics
    from guiderail.server.rewards.models.loading import model_reward
    from guiderail.server.rewards.models.reward_spec import RewardModelSpec
    from guiderail.server.scoring.batcher import BatchingScorer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    reward = model_reward(RewardModelSpec(path=folder), Path("/nonexistent"), print)
    await reward.start(None)  # type: ignore[arg-type]
    scorer = BatchingScorer({"rm": reward}, Metrics("bench"))

    def calls() -> list[tuple[ScoreGroup, int]]:
        made = []
        for owner in range(8):
            prompt = Message(PROMPT, tokenizer.decode(draw(64)))
            for _ in range(8):
                answer = Answer(tokenizer.decode(draw(64)), tuple(range(64)))
                made.append((ScoreGroup((prompt,), TokenPrompt((0,) * 64), (answer,), reward.Params()), owner))
        return made

    times = []
    for number in range(rounds + 1):
        work = calls()
        started = time.perf_counter()
        for group, owner in work:
            await scorer.score("rm", group, owner)
        middle = time.perf_counter()
        await asyncio.gather(*(scorer.score("rm", group, owner) for group, owner in calls()))
        if number:
            times.append((middle - started, time.perf_counter() - middle))
    await reward.close()
    return times


async def gaps(http: httpx.AsyncClient, number: int, tokens: int = 100) -> list[float]:
    """Milliseconds between the chunks of a streamed plain chat."""
    body = {"messages": messages(number), "max_tokens": tokens, "ignore_eos": True, "stream": True}
    found, last = [], None
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {") and '"content":' in line and '"content":""' not in line:
                now = time.perf_counter()
                if last is not None:
                    found.append((now - last) * 1e3)
                last = now
    return found


async def score_for(http: httpx.AsyncClient, seconds: float) -> int:
    """Score large batches one after another for so many seconds; return the number of answers scored."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        answers = [" ".join(random.choices(["day", "sea", "tree", "cold", "bird", "stone"], k=60)) for _ in range(16)]
        body = {"inputs": [{"messages": messages(count), "answers": answers}], "rewards": ["rm"]}
        (await http.post("/v1/rewards/score", json=body)).raise_for_status()
        count += 16
    return count


async def main(rounds: int) -> None:
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = await apart(model_folder, Path(name) / "model")
        batched = await batching(folder, rounds)
        raw, served = Raw(), Served("--reward", f"rm={folder}")
        await raw.start()
        await served.start()
        best, alone, beside = [], [], []
        try:
            for number in range(rounds + 1):
                pairs = [
                    (await raw.sixteen(9000 + 10 * number + i), await served.sixteen(5000 + 10 * number + i, "rm"))
                    for i in range(3)
                ]
                quiet = await gaps(served.http, 100 + number)
                scoring = asyncio.create_task(score_for(served.http, 6))
                await asyncio.sleep(0.5)
                busy = await gaps(served.http, 200 + number)
                await scoring
                if number:
                    best += pairs
                    alone.append(quiet)
                    beside.append(busy)
                print(f"round {number}: {pairs=}", file=sys.stderr)
        finally:
            await served.close()
            await raw.close()
    report(batched, best, alone, beside)


def percentile(values: list[float], p: float) -> float:
    return sorted(values)[min(len(values) - 1, int(p * len(values)))]


def report(
    batched: list[tuple[float, float]],
    best: list[tuple[float, float]],
    alone: list[list[float]],
    beside: list[list[float]],
) -> None:
    speed = [one / many for one, many in batched]
    cost = [ours / raw for raw, ours in best]
    p50 = [percentile(b, 0.5) / percentile(a, 0.5) for a, b in zip(alone, beside, strict=True)]
    p99 = [percentile(b, 0.99) / percentile(a, 0.99) for a, b in zip(alone, beside, strict=True)]
    rows: list[tuple[str, list[float], str, Any]] = [
        ("best of 16 x 64 with the reward model / raw generation of the same", cost, "<= 1.25", lambda r: r <= 1.25),
        ("64 score calls of 8 requests: one by one / at once", speed, ">= 1.5", lambda r: r >= 1.5),
        ("median inter-token latency of a plain chat: beside scoring / alone", p50, "", None),
        ("p99 inter-token latency of a plain chat: beside scoring / alone", p99, "", None),
    ]
    lines = [
        f"SmolLM2-135M with a scalar head ({auto_dtype()}, packed backend) in the server. Medians over rounds of ratios "
        "within a round, with the smallest and largest.",
        "",
        "| ratio | median | range | target | |",
        "|---|---|---|---|---|",
    ]
    data: dict[str, Any] = {}
    targets = []
    for title, ratios, target, met in rows:
        middle = statistics.median(ratios)
        verdict = "" if met is None else "met" if met(middle) else "**missed**"
        if met is not None:
            targets.append(Target(title, target, f"{middle:.2f}", met(middle)))
        lines.append(f"| {title} | {middle:.2f} | {min(ratios):.2f}-{max(ratios):.2f} | {target} | {verdict} |")
        data[title] = {"ratios": ratios, "target": target}
    write_section("reward_serving", "A reward model in the server", "make bench-scoring", lines, data, targets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(main(parser.parse_args().rounds))
