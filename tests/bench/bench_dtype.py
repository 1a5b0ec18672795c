"""Float32 against bfloat16 on this machine, to check that `auto` takes the faster one: `make bench-dtype`.

Two servers with the same settings live at once, one in float32 and one in bfloat16, each with the bundled reward head in
its own dtype. They take turns, never working at the same time; a ratio is the median over rounds of bfloat16 / float32 within a
round. Where bfloat16 is emulated it is slow: `--tokens 8 --rounds 2` is then enough. Writes its part of BENCHMARKS.md.

    plain       16 concurrent clients with one answer each
    best_of_16  one request, best of 16 by the reward head
"""

import argparse
import asyncio
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from load_servers import guiderail
from measured import pair_table, paired
from report import Target, write_section

HEAD = "hh-harmless-smollm2-135m"
DTYPES = ("float32", "bfloat16")
WIDTH = 16
CASES = ("plain", "best_of_16")


class Served:
    """One server, asked for answers of `tokens` tokens."""

    def __init__(self, http: httpx.AsyncClient, tokens: int) -> None:
        self._http = http
        self._tokens = tokens

    async def _answer(self, number: int, **fields: Any) -> dict[str, Any]:
        ask = [{"role": "user", "content": f"({number}) Tell me three facts about rivers."}]
        body = {"messages": ask, "max_tokens": self._tokens, "ignore_eos": True, "seed": number, **fields}
        response = await self._http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    async def dtype(self) -> str:
        return str((await self._http.get("/version")).json()["dtype"])

    async def plain(self, first: int) -> float:
        """Tokens per second."""
        started = time.perf_counter()
        answers = await asyncio.gather(*(self._answer(first + i) for i in range(WIDTH)))
        tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
        return float(tokens) / (time.perf_counter() - started)

    async def best_of_16(self, first: int) -> float:
        """Tokens per second of all candidates together, scoring included."""
        alignment = {"guide": {"name": "best_of_n", "n": WIDTH}, "rewards": ["harmless"]}
        started = time.perf_counter()
        answer = await self._answer(first, alignment=alignment)
        return float(answer["alignment"]["spend"]["tokens_generated"]) / (time.perf_counter() - started)


async def main(rounds: int, tokens: int) -> None:
    from guiderail.server.models.cpu_features import auto_dtype, instruction_set

    found: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    async with AsyncExitStack() as stack:
        servers = {}
        for dtype in DTYPES:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            flags = ["--dtype", dtype, "--reward", f"harmless={HEAD},dtype={dtype}", "--kv-cache-gb", "0.5"]
            print(f"starting a server in {dtype}", file=sys.stderr)
            server = stack.enter_context(guiderail(folder, *flags))
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, timeout=600))
            servers[dtype] = Served(http, tokens)
            assert await servers[dtype].dtype() == dtype
        for number in range(-1, rounds):  # round -1 warms both up
            for case in CASES:
                first = 1000 * (number + 2)
                order = DTYPES if number % 2 else DTYPES[::-1]
                speed = {dtype: await getattr(servers[dtype], case)(first) for dtype in order}
                if number >= 0:
                    found[case].append((speed["float32"], speed["bfloat16"]))
                    print(f"round {number + 1}, {case}: {speed}", file=sys.stderr)
        report(found, auto_dtype(), instruction_set(), tokens)  # before the servers shut down, which is slow


def report(found: dict[str, list[tuple[float, float]]], auto: str, instructions: str, tokens: int) -> None:
    """Write the section."""
    table = [(case, paired(pairs), "tokens/s", "") for case, pairs in found.items()]
    faster = {case: "bfloat16" if each.ratio > 1 else "float32" for case, each, *_ in table}
    data: dict[str, Any] = {"instruction_set": instructions, "auto": auto, "tokens": tokens}
    for case, each, *_ in table:
        data[case] = {"pairs": found[case], "ratio": each.ratio, "faster": faster[case]}
    taken = [case for case in found if faster[case] == auto]
    missed = [case for case in found if case not in taken]
    verdict = f"`auto` is {auto} here: the faster one for {', '.join(taken) or 'none of these'}"
    lines = [
        f"SmolLM2-135M and the bundled reward head on it, answers of {tokens} tokens, instruction set {instructions}. "
        "Medians over rounds; the ratio is the median of bfloat16 / float32 within a round, with the smallest and largest.",
        "",
        *pair_table("float32", "bfloat16", "range", table, targets=False),
        "",
        verdict + (f"; **the slower one for {', '.join(missed)}**." if missed else "."),
    ]
    target = Target("`--dtype auto` is the faster dtype", "in both cases", ", ".join(taken) or "neither", not missed)
    write_section("dtype", "Float32 against bfloat16", "make bench-dtype", lines, data, [target])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    asyncio.run(main(given.rounds, given.tokens))
