"""Guiderail against a plain script over `vllm serve`: part of `make bench`.

The script is what a team would write first: one request with `n` answers over HTTP, the same rule reward on each
answer, and the best one kept. Both servers run with the same model, dtype, context, KV cache and pages, live at once, and
take turns (who begins alternates). A ratio is above 1 where Guiderail is faster; it is the median over pairs of turns,
with a 95 % bootstrap interval over pairs. Writes benchmarks/peers.json and its part of BENCHMARKS.md.

    best of 8    16 prompts, 4 at once, best of 8 x 48 tokens by the rule reward `length`; tokens per second
    best of n    one such request alone, for several n; 1 / time
    streamed     16 clients, each with one streamed chat of 48 tokens after another; tokens per second
"""

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from asking import QUIET_S, at_once, user
from bench_server import CLIENTS, PLACES, QUESTIONS
from load_servers import guiderail, vllm
from measured import pair_table, paired
from report import RESULTS, Target, machine, write_section

from guiderail.server.rewards.rules import Length

N, TOKENS, PROMPTS, AT_ONCE = 8, 48, 16, 4
ALONE = (1, 4, 16, 128)
STREAMS = 3 * CLIENTS
ASKED = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0}


def question(i: int) -> list[dict[str, str]]:
    """A conversation that no other turn has used, so that neither server has it in its cache."""
    return user(f"({i}) " + QUESTIONS[i % len(QUESTIONS)].format(PLACES[i % len(PLACES)]))


class Script:
    """A client of `vllm serve` that draws n answers, scores them here and keeps the best."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=64))
        self._reward, self._params = Length(), Length.Params()

    async def best_of(self, i: int, n: int) -> int:
        """Answer the i-th question; return the number of tokens generated for it."""
        messages = question(i)
        body = await self._post({"messages": messages, "n": n, **ASKED})
        texts = [choice["message"]["content"] for choice in body["choices"]]
        max(texts, key=lambda text: self._reward.score_text(messages[-1]["content"], text, self._params))
        return int(body["usage"]["completion_tokens"])

    async def streamed(self, i: int) -> int:
        """Stream one chat to its end; return its tokens."""
        body = {"messages": question(i), "stream": True, "stream_options": {"include_usage": True}, **ASKED}
        tail = b""
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for part in response.aiter_raw():
                tail = (tail + part)[-4096:]
        return TOKENS if b'"usage":{' in tail.replace(b" ", b"") else 0

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    async def close(self) -> None:
        await self._http.aclose()


class Guided(Script):
    """A client of `guiderail serve`, which does the same inside."""

    async def best_of(self, i: int, n: int) -> int:
        alignment = {"guide": {"name": "best_of_n", "n": n}, "rewards": [{"name": "length"}]}
        body = await self._post({"messages": question(i), "alignment": alignment, **ASKED})
        return int(body["alignment"]["spend"]["tokens_generated"])


async def rate(work: Awaitable[list[int]], expected: int) -> float:
    """Tokens per second of some work, from a quiet start; it must produce exactly the expected tokens."""
    await asyncio.sleep(QUIET_S)
    started = time.perf_counter()
    tokens = sum(await work)
    seconds = time.perf_counter() - started
    assert tokens == expected, f"{tokens} tokens instead of {expected}"
    return tokens / seconds


Turn = Callable[[Script, int], Awaitable[float]]


def cases(prompts: int = PROMPTS) -> dict[str, Turn]:
    """A turn of each case: tokens per second of one side, with questions from the number `first` on."""

    def many(side: Script, first: int) -> Awaitable[float]:
        work = [lambda i=i: side.best_of(first + i, N) for i in range(prompts)]
        return rate(at_once(work, AT_ONCE), prompts * N * TOKENS)

    def streams(side: Script, first: int) -> Awaitable[float]:
        work = [lambda i=i: side.streamed(first + i) for i in range(STREAMS)]
        return rate(at_once(work, CLIENTS), STREAMS * TOKENS)

    def single(n: int) -> Turn:
        times = 3 if n <= 16 else 1

        async def one(side: Script, first: int) -> list[int]:
            return [await side.best_of(first + i, n) for i in range(times)]

        return lambda side, first: rate(one(side, first), times * n * TOKENS)

    found: dict[str, Turn] = {f"best of {N}, {prompts} prompts, {AT_ONCE} at once": many}
    found |= {f"best of {n}, alone": single(n) for n in ALONE}
    return found | {f"streamed chats, {CLIENTS} at once": streams}


async def compare(
    script: Script, guided: Script, pairs: int, turns: dict[str, Turn], found: dict[str, list[list[float]]]
) -> None:
    """Add to `found` each case's pairs (script, Guiderail) of tokens per second; its first pair only warms both up.

    The section is written after each case, so that an interrupted run keeps what it has.
    """
    for k, (name, turn) in enumerate(turns.items()):
        rates: list[list[float]] = []
        for number in range(pairs + 1):
            first = 100_000 * (number + 1) + 1000 * k
            sides = [(0, script), (1, guided)]
            pair = [0.0, 0.0]
            for place, side in sides if number % 2 else reversed(sides):
                pair[place] = await turn(side, first + 500 * place)
            print(f"{number}/{pairs} {name}: {pair[0]:.1f} {pair[1]:.1f} {pair[1] / pair[0]:.3f}", file=sys.stderr)
            rates += [pair] if number else []
        found[name] = rates
        report({name: found[name] for name in cases() if name in found})


def kept() -> dict[str, list[list[float]]]:
    """The pairs of cases that were measured before, on this processor and with these versions."""
    path = RESULTS / "peers.json"
    before = json.loads(path.read_text()) if path.exists() else {"machine": {}, "results": {}}
    here = {name: value for name, value in machine().items() if name != "date"}
    alike = here.items() <= before["machine"].items()
    return {name: each["pairs"] for name, each in before["results"].items()} if alike else {}


def report(found: dict[str, list[list[float]]]) -> None:
    """Write the section."""
    table, targets, data = [], [], {}
    for name, rates in found.items():
        each = paired(rates, by_interval=True)
        met = each.high >= 1
        table.append((name, each, "tokens/s", f"1.0 in the interval | {'met' if met else '**missed**'}"))
        data[name] = {"pairs": rates, "ratio": each.ratio, "interval": [each.low, each.high], "met": met}
        result = f"{each.ratio:.3f} ({each.low:.3f}-{each.high:.3f})"
        targets.append(
            Target(f"tokens/s, Guiderail / script over vllm serve: {name}", "interval reaches 1.0", result, met)
        )
    lines = [
        f"Tokens per second of Guiderail and of a script over `vllm serve` ({TOKENS} tokens an answer, rule reward "
        f"`length`), at least {min(map(len, found.values()))} interleaved pairs of turns. Ratio: median over pairs with its 95 % interval; target: 1.0 "
        "within the interval or below it.",
        "",
        *pair_table("vllm serve + script", "Guiderail", "95 % interval", table),
    ]
    write_section("peers", "Against a script over vllm serve", "make bench", lines, data, targets)


async def main(pairs: int, only: str) -> None:
    turns = {name: turn for name, turn in cases().items() if re.search(only, name)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        print("starting vllm serve and guiderail serve", file=sys.stderr)
        script, guided = (
            Script(stack.enter_context(vllm(folder)).url),
            Guided(stack.enter_context(guiderail(folder)).url),
        )
        try:
            await compare(script, guided, pairs, turns, kept() if only else {})
        finally:
            await script.close()
            await guided.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--only", default="", help="cases whose name matches this expression; others stay as they were measured here"
    )
    given = parser.parse_args()
    asyncio.run(main(given.rounds, given.only))
