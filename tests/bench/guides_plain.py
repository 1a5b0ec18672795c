"""Part of bench_guides.py: Transfer Q* and DeAL against the published loop on plain transformers."""

import asyncio
import statistics
from functools import cache
from typing import Any

import torch
from asking import HEAD, QUIET_S, Raw, ask, at_once, seconds, user, verdict
from bench_scoring import apart
from plain_search import PlainSearch

from guiderail.guides.types import Message
from guiderail.server import models
from guiderail.server.state import ServerState

TOP_K, LOOKAHEAD, TOGETHER = 10, 20, 8
LENGTHS = (64, 200, 400)  # tokens of the prompt, about
SEARCHES: dict[str, tuple[dict[str, Any], bool]] = {  # the guide, and whether its lookahead is sampled
    "Transfer Q*": ({"name": "transfer_q", "top_k": TOP_K, "lookahead": LOOKAHEAD}, True),
    "DeAL": ({"name": "deal", "beams": 1, "top_k": TOP_K, "lookahead": LOOKAHEAD}, False),
}
NOTES = (
    "The bakery opens at seven and closes at noon.", "On Mondays the market has fresh fish from the coast.",
    "Our street has two plane trees and a green bench.", "The last bus to the station leaves at half past ten.",
    "My aunt keeps bees behind the old school.", "The museum shows maps from three centuries.",
    "In spring the river often floods the lower path.", "The choir practises every Thursday evening.",
    "A new cafe with yellow chairs has opened by the bridge.", "The library lends tools as well as books.",
    "Nobody knows who painted the boat on the town hall.", "In winter the lake is used for skating.",
)  # fmt: skip


def conversation(state: ServerState, length: int, number: int) -> tuple[list[dict[str, str]], int]:
    """A conversation of about `length` tokens that differs from every other from its beginning, and its length."""
    text = f"Note {number}. Write a short and friendly guide to our town for visitors."
    taken = 0
    while True:
        messages = user(text)
        tokens = len(state.renderer.render([Message(m["role"], m["content"]) for m in messages]).token_ids)
        if tokens >= length - 6:
            return messages, tokens
        text += " " + NOTES[(number + taken) % len(NOTES)]
        taken += 1


async def against_plain(
    state: ServerState, raw: Raw, tokens: int, answers: dict[str, int], lengths: tuple[int, ...] = LENGTHS
) -> tuple[list[str], dict[str, Any]]:
    """Seconds per answer of the published loop and of the guide, taking turns; `answers`: how many of each search."""

    @cache
    def loop() -> PlainSearch:
        policy = models.resolve(state.settings.model, state.settings.cache)
        return PlainSearch(policy, HEAD, state.settings.cache)

    def guided(guide: dict[str, Any], messages: list[dict[str, str]]) -> Any:
        return ask(
            state, messages=messages, max_tokens=tokens, ignore_eos=True, seed=1,
            alignment={"guide": guide, "rewards": [{"name": "harmless"}]},
        )  # fmt: skip

    data: dict[str, Any] = {}
    number = 0
    for length in lengths:
        for name, (guide, sampled) in SEARCHES.items():
            rows = []
            for turn in range(answers[name] + 1):  # the first, of few tokens, warms up
                number += 1

                async def pair(
                    guide: Any = guide,
                    sampled: bool = sampled,
                    turn: int = turn,
                    number: int = number,
                    length: int = length,
                ) -> dict[str, Any]:
                    search = await apart(loop)
                    messages, prompt_tokens = conversation(state, length, number)
                    ours: list[dict[str, Any]] = []

                    async def run() -> None:
                        ours.append(await guided(guide, messages))

                    taken = await seconds(run())
                    await asyncio.sleep(QUIET_S)
                    plain = await apart(
                        lambda: search.answer(
                            messages, tokens if turn else 2, top_k=TOP_K, lookahead=LOOKAHEAD, sampled=sampled
                        )
                    )
                    text = ours[0]["choices"][0]["message"]["content"]
                    return {
                        "prompt_tokens": prompt_tokens, "guided_s": taken, "plain_s": plain.seconds,
                        "same": _same(state.renderer.encode(text), plain.token_ids),
                        "reward": ours[0]["alignment"]["choices"][0]["rewards"]["harmless"],
                        "plain_reward": (
                            await apart(lambda: search.rewards(messages, [state.renderer.decode(plain.token_ids)], whole=True))
                        ).item(),
                        "threads": torch.get_num_threads(),
                    }  # fmt: skip

                row = await raw.get(f"plain/{length}/{name}/{turn}", pair)
                if turn:
                    rows.append(row)

            async def together(guide: Any = guide, number: int = number, length: int = length) -> float:
                work = [conversation(state, length, 1000 + 100 * number + i)[0] for i in range(TOGETHER)]
                return await seconds(at_once([lambda m=m: guided(guide, m) for m in work], TOGETHER))

            data[f"{name}/{length}"] = {"rows": rows, "together_s": await raw.get(f"plain/{length}/{name}/8", together)}
    return _lines(data, tokens), data


def _same(ours: list[int], plain: list[int]) -> int:
    """Tokens until the answers part."""
    return next((i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), min(len(ours), len(plain)))


def _lines(data: dict[str, Any], tokens: int) -> list[str]:
    first = next(iter(data.values()))["rows"][0]
    lines = [
        f"Answers of {tokens} tokens, k {TOP_K}, lookahead {LOOKAHEAD}, SmolLM2-135M and the bundled reward head on a second "
        "copy of it, all bfloat16. Plain: tests/bench/plain_search.py, the published loop on transformers (no keys and "
        "values kept between tokens, one batch of candidates a token, text re-encoded for the reward model) with "
        f"{first['threads']} threads; guided: one request alone, and {TOGETHER} at once, where plain has no such thing. They "
        "take turns. Transfer Q* samples its lookahead, DeAL decodes it greedily; rollouts end where the answer must in both.",
        "",
        "| guide | prompt tokens | plain, s | guided, s | speed-up, one request | range | speed-up, 8 in flight | target | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in data.items():
        pairs = row["rows"]
        ratios = [pair["plain_s"] / pair["guided_s"] for pair in pairs]
        plain = statistics.mean(pair["plain_s"] for pair in pairs)
        guided = statistics.mean(pair["guided_s"] for pair in pairs)
        middle = statistics.median(ratios)
        many = TOGETHER / row["together_s"] * plain
        lines.append(
            f"| {name.partition('/')[0]} | {pairs[0]['prompt_tokens']} | {plain:.1f} | {guided:.2f} | {middle:.1f} "
            f"| {min(ratios):.1f}-{max(ratios):.1f} | {many:.1f} | >= 10 for one request "
            f"| {verdict(middle, 10, at_most=False)} |"
        )
    greedy = [pair for name, row in data.items() if name.startswith("DeAL") for pair in row["rows"]]
    same = ", ".join(str(pair["same"]) for pair in greedy)
    lines += [
        "",
        f"Both look for the same: with the greedy lookahead they agree for the first {same} of {tokens} tokens, until "
        "rounding parts them.",
    ]
    return lines
