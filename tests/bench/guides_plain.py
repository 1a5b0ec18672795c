"""Part of bench_guides.py: Transfer Q* and DeAL against the published loop on plain transformers."""

import asyncio
import statistics
from functools import cached_property, partial
from itertools import count, product
from typing import Any

import torch
from asking import HEAD, QUIET_S, Raw, ask, at_once, seconds, user
from bench_scoring import apart
from measured import verdict
from plain_search import PlainSearch
from report import Results, Target

from guiderail.guides.core.types import Message
from guiderail.server.models import catalogue
from guiderail.server.models.cpu_features import auto_dtype
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


class Rivals:
    """The guides of a server and the plain loop, given the same requests."""

    def __init__(self, state: ServerState, tokens: int) -> None:
        self.state = state
        self.tokens = tokens

    @cached_property
    def loop(self) -> PlainSearch:
        """Loaded when first asked for, on the thread that does all torch work."""
        policy = catalogue.resolve(self.state.settings.model, self.state.settings.cache)
        return PlainSearch(policy, HEAD, self.state.settings.cache)

    def guided(self, guide: dict[str, Any], messages: list[dict[str, str]]) -> Any:
        """A request."""
        return ask(
            self.state, messages=messages, max_tokens=self.tokens, ignore_eos=True, seed=1,
            alignment={"guide": guide, "rewards": [{"name": "harmless"}]},
        )  # fmt: skip

    async def pair(self, name: str, length: int, number: int, plain_tokens: int) -> dict[str, Any]:
        """The guide, and then the plain loop, on one conversation."""
        guide, sampled = SEARCHES[name]
        await apart(lambda: self.loop)
        messages, prompt_tokens = conversation(self.state, length, number)
        ours: list[dict[str, Any]] = []

        async def run() -> None:
            ours.append(await self.guided(guide, messages))

        guided_s = await seconds(run())
        await asyncio.sleep(QUIET_S)
        how = {"top_k": TOP_K, "lookahead": LOOKAHEAD, "sampled": sampled}
        plain = await apart(lambda: self.loop.answer(messages, plain_tokens, **how))
        text = self.state.renderer.decode(plain.token_ids)
        return {
            "prompt_tokens": prompt_tokens,
            "guided_s": guided_s,
            "plain_s": plain.seconds,
            "same": _same(self.state.renderer.encode(ours[0]["choices"][0]["message"]["content"]), plain.token_ids),
            "reward": ours[0]["alignment"]["choices"][0]["rewards"]["harmless"],
            "plain_reward": (await apart(lambda: self.loop.rewards(messages, [text], whole=True))).item(),
            "threads": torch.get_num_threads(),
        }

    async def together(self, name: str, length: int, number: int) -> float:
        """Seconds for TOGETHER conversations at once, all different."""
        work = [conversation(self.state, length, 1000 + 100 * number + i)[0] for i in range(TOGETHER)]
        return await seconds(at_once([lambda m=m: self.guided(SEARCHES[name][0], m) for m in work], TOGETHER))


async def against_plain(
    state: ServerState, raw: Raw, tokens: int, answers: dict[str, int], lengths: tuple[int, ...] = LENGTHS
) -> Results:
    """Seconds per answer of the published loop and of the guide, taking turns; `answers`: how many of each search."""
    rivals = Rivals(state, tokens)
    numbers = count(1)
    data: dict[str, Any] = {}
    for length, name in product(lengths, SEARCHES):
        rows = []
        for turn in range(answers[name] + 1):
            of_plain = tokens if turn else 2  # the first warms up
            number = next(numbers)
            row = await raw.get(f"plain/{length}/{name}/{turn}", partial(rivals.pair, name, length, number, of_plain))
            if turn:
                rows.append(row)
        many = await raw.get(f"plain/{length}/{name}/8", partial(rivals.together, name, length, next(numbers)))
        data[f"{name}/{length}"] = {"rows": rows, "together_s": many}
    lines, targets = _lines(data, tokens)
    return lines, data, targets


def _same(ours: list[int], plain: list[int]) -> int:
    """Tokens until the answers diverge."""
    return next((i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), min(len(ours), len(plain)))


def _lines(data: dict[str, Any], tokens: int) -> tuple[list[str], list[Target]]:
    first = next(iter(data.values()))["rows"][0]
    lines = [
        f"Answers of {tokens} tokens, k {TOP_K}, lookahead {LOOKAHEAD}, SmolLM2-135M and the bundled reward head on a second "
        f"copy of it, all {auto_dtype()}. Plain: tests/bench/plain_search.py, the published loop on transformers (no keys and "
        "values kept between tokens, one batch of candidates per token, text re-encoded for the reward model) with "
        f"{first['threads']} threads; guided: one request alone, and {TOGETHER} at once, which plain cannot do. They "
        "take turns. Transfer Q* samples its lookahead, DeAL decodes it greedily; in both, rollouts end where the answer must.",
        "",
        "| guide | prompt tokens | plain, s | guided, s | speed-up, one request (range) | >= 10 | answers/s, 8 in flight / plain | >= 10 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    speeds: dict[str, dict[int, float]] = {}  # by measure and prompt tokens
    for name, row in data.items():
        pairs = row["rows"]
        ratios = [pair["plain_s"] / pair["guided_s"] for pair in pairs]
        plain = statistics.mean(pair["plain_s"] for pair in pairs)
        guided = statistics.mean(pair["guided_s"] for pair in pairs)
        middle = statistics.median(ratios)
        many = TOGETHER / row["together_s"] * plain
        guide = name.partition("/")[0]
        for title, value in (("one request", middle), (f"{TOGETHER} in flight", many)):
            speeds.setdefault(f"{guide} / plain transformers, {title}", {})[pairs[0]["prompt_tokens"]] = value
        lines.append(
            f"| {guide} | {pairs[0]['prompt_tokens']} | {plain:.1f} | {guided:.2f} | {middle:.1f} "
            f"({min(ratios):.1f}-{max(ratios):.1f}) | {verdict(middle, 10, at_most=False)} | {many:.1f} "
            f"| {verdict(many, 10, at_most=False)} |"
        )
    greedy = [pair for name, row in data.items() if name.startswith("DeAL") for pair in row["rows"]]
    same = ", ".join(str(pair["same"]) for pair in greedy)
    lines += [
        "",
        f"Both search for the same thing: with the greedy lookahead they agree for the first {same} of {tokens} tokens, until "
        "rounding makes them diverge.",
    ]
    targets = [
        Target(
            f"speed of {measure}, prompts of {', '.join(map(str, by_prompt))} tokens",
            ">= 10", ", ".join(f"{value:.1f}" for value in by_prompt.values()), min(by_prompt.values()) >= 10,
        )
        for measure, by_prompt in speeds.items()
    ]  # fmt: skip
    return lines, targets
