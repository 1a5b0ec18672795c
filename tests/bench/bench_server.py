"""Guiderail against raw vLLM, side by side in one run: `make bench`.

Two engines of the same settings live at once: one driven in this process through AsyncLLM, one behind
`guiderail serve` in processes of its own. They take turns, never running together, and each ratio is
the median over rounds of the ratio within a round. Writes benchmarks/server.json and its part of BENCHMARKS.md.

    plain       16 concurrent clients, each asking for one answer of 64 tokens after another;
                ratio of tokens per second, server to raw vLLM with 16 sequences kept in flight
    best_of_16  one request, best of 16 x 64 tokens with the rule reward `length`;
                ratio of time to raw vLLM generating 16 x 64 tokens after the same prompt
"""

import argparse
import asyncio
import re
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from load_servers import guiderail
from measured import pair_table, paired, verdict
from report import Target, write_section

CLIENTS, TOKENS = 16, 64
QUESTIONS = [
    "What is the capital of {}?", "Tell me three facts about {}.", "Write two sentences on the weather in {}.",
    "How would you travel to {} from here?", "Name a dish from {} and describe it.",
]  # fmt: skip
PLACES = ["France", "Peru", "Kenya", "Japan", "Norway", "Egypt", "Canada", "Vietnam", "Chile", "Greece", "India"]


def messages(i: int) -> list[dict[str, str]]:
    text = QUESTIONS[i % len(QUESTIONS)].format(PLACES[i % len(PLACES)])
    return [{"role": "user", "content": f"({i}) {text}"}]


class Raw:
    """vLLM's AsyncLLM in this process, with our settings and nothing else of ours."""

    async def start(self) -> None:
        from vllm.sampling_params import RequestOutputKind

        from guiderail.server.engines.vllm.engine import build
        from guiderail.server.engines.vllm.engine_args import EngineSettings
        from guiderail.server.models import catalogue
        from guiderail.server.models.renderer import ChatRenderer
        from guiderail.server.settings import Settings

        path = catalogue.resolve(catalogue.DEFAULT_MODEL, Settings().cache)
        self._engine = await build(EngineSettings(model=path, max_model_len=2048))
        self._llm = self._engine._llm
        self._renderer = ChatRenderer(path)
        self._kind = RequestOutputKind.FINAL_ONLY
        self._n = 0

    async def _answer(self, ids: tuple[int, ...], n: int = 1) -> int:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        params = SamplingParams(n=n, max_tokens=TOKENS, ignore_eos=True, output_kind=self._kind)
        self._n += 1
        count = 0
        async for output in self._llm.generate(tokens_input(list(ids)), params, f"raw-{self._n}"):
            count += sum(len(o.token_ids) for o in output.outputs)
        return count

    def ids(self, i: int) -> tuple[int, ...]:
        from guiderail.guides.core.types import Message

        return self._renderer.render([Message(m["role"], m["content"]) for m in messages(i)]).token_ids

    async def plain(self, first: int, count: int) -> float:
        """Tokens per second with CLIENTS sequences in flight. Includes rendering, as for the server."""
        numbers = iter(range(first, first + count))

        async def client() -> int:
            return sum([await self._answer(self.ids(i)) for i in numbers])

        started = time.perf_counter()
        tokens = sum(await asyncio.gather(*(client() for _ in range(CLIENTS))))
        return tokens / (time.perf_counter() - started)

    async def sixteen(self, i: int) -> float:
        """Seconds for 16 answers to one prompt."""
        started = time.perf_counter()
        assert await self._answer(self.ids(i), n=16) == 16 * TOKENS
        return time.perf_counter() - started

    async def close(self) -> None:
        await self._engine.close()


class Served:
    """`guiderail serve` in processes of its own, asked over HTTP."""

    def __init__(self, *flags: str) -> None:
        self.flags = flags

    async def start(self) -> None:
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(TemporaryDirectory()))
        server = self._stack.enter_context(guiderail(folder, *self.flags, context="2048"))
        self.http = httpx.AsyncClient(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=64))

    async def _answer(self, i: int, **fields: Any) -> dict[str, Any]:
        body = {"messages": messages(i), "max_tokens": TOKENS, "ignore_eos": True, **fields}
        response = await self.http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    async def _streamed(self, i: int) -> int:
        body = {"messages": messages(i), "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            text = b"".join([part async for part in response.aiter_raw()])
        found = re.findall(rb'"tokens_accepted":(\d+)', text)
        return int(found[-1])

    async def plain(self, first: int, count: int, *, stream: bool = False) -> float:
        """Tokens per second with CLIENTS clients, each with one request after another."""
        numbers = iter(range(first, first + count))

        async def client() -> int:
            if stream:
                return sum([await self._streamed(i) for i in numbers])
            return sum([(await self._answer(i))["usage"]["completion_tokens"] for i in numbers])

        started = time.perf_counter()
        tokens = sum(await asyncio.gather(*(client() for _ in range(CLIENTS))))
        return tokens / (time.perf_counter() - started)

    async def sixteen(self, i: int, reward: str = "length") -> float:
        """Seconds for best of 16 x 64 tokens with one reward."""
        alignment = {"guide": {"name": "best_of_n", "n": 16}, "rewards": [{"name": reward}]}
        started = time.perf_counter()
        answer = await self._answer(i, alignment=alignment)
        seconds = time.perf_counter() - started
        assert answer["alignment"]["spend"]["tokens_generated"] == 16 * TOKENS
        return seconds

    async def close(self) -> None:
        await self.http.aclose()
        self._stack.close()


async def main(rounds: int) -> None:
    raw, served = Raw(), Served()
    print("starting two engines", file=sys.stderr)
    await raw.start()
    await served.start()
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "plain, streamed": [], "best_of_16": []}
    try:
        count = 3 * CLIENTS
        for number in range(-1, rounds):  # round -1 warms both up
            base = 1000 * (number + 2)
            plain = (await raw.plain(base, count), await served.plain(base + 100, count))
            streamed = (await raw.plain(base + 200, count), await served.plain(base + 300, count, stream=True))
            best = [(await raw.sixteen(base + 400 + i), await served.sixteen(base + 500 + i)) for i in range(3)]
            if number < 0:
                continue
            found["plain"].append(plain)
            found["plain, streamed"].append(streamed)
            found["best_of_16"] += best
            print(f"round {number + 1}: {plain=} {streamed=} {best=}", file=sys.stderr)
    finally:
        await served.close()
        await raw.close()
    report(found)


def report(found: dict[str, list[tuple[float, float]]]) -> None:
    """Write the section."""
    wanted = {"plain": (">= 0.95", 0.95), "plain, streamed": ("(no target)", None), "best_of_16": ("<= 1.10", 1.10)}
    table, targets, data = [], [], {}
    for name, pairs in found.items():
        each, (text, target) = paired(pairs), wanted[name]
        timed = name == "best_of_16"  # seconds, of which less is better; the others are tokens/s
        word = "" if target is None else verdict(each.ratio, target, at_most=timed)
        met = None if target is None else word == "met"
        table.append((name, each, "s" if timed else "tokens/s", f"{text} | {word}"))
        data[name] = {"pairs": pairs, "ratio": each.ratio, "target": text, "met": met}
        if met is not None:
            targets.append(Target(f"{NAMES[name]}, Guiderail / raw vLLM", text, f"{each.ratio:.3f}", met))
    lines = [
        "Guiderail's server against raw vLLM (AsyncLLM in-process, same settings), alternating in one run. "
        "Ratio: median over rounds of server / raw, with the smallest and largest.",
        "",
        *pair_table("raw vLLM", "Guiderail", "range", table),
    ]
    write_section("server", "Server overhead", "make bench", lines, data, targets)


NAMES = {
    "plain": "tokens/s of plain chats, 16 clients",
    "best_of_16": "time of best-of-16 x 64 tokens with a rule reward",
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    asyncio.run(main(parser.parse_args().rounds))
