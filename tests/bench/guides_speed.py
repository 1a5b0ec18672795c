"""Parts of bench_guides.py: speed of every guide, and block-level guides against plain sampling of as many answers."""

import statistics
from itertools import count
from typing import Any

from asking import EVERYDAY, Raw, ask, at_once, questions, seconds, user
from measured import verdict
from report import Results, Target

from guiderail.server.state import ServerState

TOGETHER = 8  # concurrent requests
REWARDS: dict[str, list[dict[str, Any]]] = {
    "neural": [{"name": "harmless"}],
    "rule": [{"name": "length", "target": 40}],
    "none": [],
}
GENTLE = {"system": "You are warm, patient and kind."}
SETTINGS: list[tuple[str, dict[str, Any], int]] = [  # title, guide, tokens of an answer
    ("sampling", {"name": "sampling"}, 64),
    ("best_of_n, n 16", {"name": "best_of_n", "n": 16}, 64),
    (
        "speculative_rejection, n 32, alpha 0.5, interval 16",
        {"name": "speculative_rejection", "n": 32, "alpha": 0.5, "interval": 16}, 64,
    ),
    ("controlled_decoding, k 8, block 32", {"name": "controlled_decoding", "k": 8, "block": 32}, 64),
    ("controlled_decoding, k 8, block 16", {"name": "controlled_decoding", "k": 8, "block": 16}, 64),
    (
        "transfer_q, blocks of 16, k 8, lookahead 16",
        {"name": "transfer_q", "top_k": 8, "block": 16, "lookahead": 16, "baseline": GENTLE}, 64,
    ),
    ("transfer_q, k 10, lookahead 20", {"name": "transfer_q", "top_k": 10, "lookahead": 20, "baseline": GENTLE}, 32),
    ("args, k 10", {"name": "args", "top_k": 10, "w": 1.5}, 64),
    ("deal, 1 beam, k 10, lookahead 20", {"name": "deal", "beams": 1, "top_k": 10, "lookahead": 20}, 32),
    ("logit_mix, one more policy", {"name": "logit_mix", "policies": [{**GENTLE, "weight": 1.0}]}, 64),
]  # fmt: skip
UNREWARDED = ("sampling", "logit_mix")
_numbers = count()


def question() -> list[dict[str, str]]:
    """A conversation whose beginning no other request of this run shares."""
    texts, number = questions(EVERYDAY), next(_numbers)
    return user(f"({number}) {texts[number % len(texts)]}")


async def speed(state: ServerState, raw: Raw, singles: int, longest: int | None = None) -> Results:
    """Tokens per second and seconds per answer of every guide, alone and with TOGETHER requests at once.

    longest: bounds the tokens of an answer, for a rehearsal.
    """
    data: dict[str, Any] = {}
    missing = sorted({guide["name"] for _, guide, _ in SETTINGS} - set(state.guides))
    for title, guide, full in SETTINGS:
        tokens = min(full, longest or full)
        if guide["name"] in missing:
            continue
        for kind in ("none",) if guide["name"] in UNREWARDED else ("neural", "rule"):

            async def one(guide: Any = guide, tokens: int = tokens, kind: str = kind) -> dict[str, Any]:
                return await ask(
                    state, messages=question(), max_tokens=tokens, ignore_eos=True, seed=next(_numbers),
                    alignment={"guide": guide, "rewards": REWARDS[kind]},
                )  # fmt: skip

            async def measure(one: Any = one) -> dict[str, Any]:
                await one()  # warms up: the first call of a guide pays for late compilation and loading
                spends, alone = [], []
                for _ in range(singles):
                    answers: list[dict[str, Any]] = []
                    alone.append(await seconds(_into(answers, one())))
                    spends.append(answers[0]["alignment"]["spend"])
                together = await seconds(at_once([one] * TOGETHER, TOGETHER))
                return {
                    "alone_s": alone,
                    "together_s": together,
                    "generated": statistics.mean(spend["tokens_generated"] for spend in spends),
                    "scoring_s": statistics.mean(spend["scoring_s"] for spend in spends),
                }

            data[f"{title} | {kind}"] = {"tokens": tokens} | await raw.get(f"speed/{title}/{kind}", measure)
    lines = [
        "Answers of exactly 32 or 64 tokens by SmolLM2-135M; the neural reward is the bundled head on a second copy of the "
        "model, the rule is `length`. Time per answer: one request alone, median. Tokens/s count the answer's own tokens.",
        "",
        "| guide | reward | tokens | generated | s per answer | tokens/s, 1 request | tokens/s, 8 requests |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in data.items():
        title, _, kind = name.partition(" | ")
        alone = statistics.median(row["alone_s"])
        lines.append(
            f"| {title} | {kind} | {row['tokens']} | {row['generated']:.0f} | {alone:.2f} | {row['tokens'] / alone:.1f} "
            f"| {TOGETHER * row['tokens'] / row['together_s']:.1f} |"
        )
    if missing:
        lines += ["", f"Not installed, so not measured: {', '.join(missing)}."]
    return lines, data, []


async def _into(found: list[dict[str, Any]], work: Any) -> None:
    found.append(await work)


BLOCKS = (16, 32)
WIDTH = 8


async def blocks(state: ServerState, raw: Raw, rounds: int) -> Results:
    """Seconds of block-level guides with K = 8, over those of drawing 8 plain answers of the same length."""
    settings: list[dict[str, Any]] = [
        *({"name": "controlled_decoding", "k": WIDTH, "block": block} for block in BLOCKS),
        {"name": "transfer_q", "top_k": WIDTH, "block": 16, "lookahead": 16},
    ]
    guides = {f"{guide['name']}/{guide['block']}": guide for guide in settings}
    data: dict[str, list[list[float]]] = {f"{name}/{kind}": [] for name in guides for kind in ("rule", "neural")}

    def plain() -> Any:
        return ask(state, messages=question(), max_tokens=64, n=WIDTH, ignore_eos=True, seed=1)

    def guided(name: str, kind: str) -> Any:
        return ask(
            state, messages=question(), max_tokens=64, ignore_eos=True, seed=1,
            alignment={"guide": guides[name], "rewards": REWARDS[kind]},
        )  # fmt: skip

    for number in range(rounds + 1):  # the first warms up
        for key in data:

            async def measure(key: str = key) -> list[float]:
                name, _, kind = key.rpartition("/")
                return [await seconds(plain()), await seconds(guided(name, kind))]

            pair = await raw.get(f"blocks/{number}/{key}", measure)
            if number:
                data[key].append(pair)
    lines = [
        f"One request of 64 tokens with k {WIDTH}, against {WIDTH} plain answers (`n`: {WIDTH}) in the same round. Ratios: "
        f"median of {rounds} rounds, with the smallest and largest. Transfer Q*: blocks of 16 and a lookahead of 16, so it "
        "decodes 7/4 of the tokens, one rollout after another.",
        "",
        "| guide | block | reward | plain, s | guided, s | ratio | range | target | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    targets = []
    for key, pairs in data.items():
        name, _, kind = key.rpartition("/")
        ratios = [b / a for a, b in pairs]
        middle = statistics.median(ratios)
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        measure = f"time of {name.replace('/', ', blocks of ')}, k {WIDTH}, {kind} reward / {WIDTH} plain answers"
        targets.append(Target(measure, "<= 2", f"{middle:.2f}", middle <= 2))
        lines.append(
            f"| {guides[name]['name']} | {guides[name]['block']} | {kind} | {a:.2f} | {b:.2f} | {middle:.2f} "
            f"| {min(ratios):.2f}-{max(ratios):.2f} | <= 2 | {verdict(middle, 2, at_most=True)} |"
        )
    return lines, data, targets
