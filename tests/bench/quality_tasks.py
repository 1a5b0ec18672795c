"""Tasks and methods of bench_quality.py: prompts, steering rewards, judges, and every guide at one budget.

All prompts are our own. Weights and block sizes were chosen for each task on other prompts than the tables use
(`bench_quality.py choose`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from asking import EVERYDAY, MORE, questions, user
from quality_judges import CLEAR, POLITE, WARM

BUDGET = 16  # multiple of the answer's tokens that each guide may generate for one answer, about: best-of-16's
NS = (4, 16, 32)
SEQUENCES = 96  # in the engine at once

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
GRID: dict[str, tuple[float, ...]] = {  # values that `choose` tries, by guide
    "controlled decoding": (4, 8, 12),  # block
    "Transfer Q*, blocks": (4, 8, 12),  # block
    "Transfer Q*": STRENGTHS,  # 1 / alpha
    "ARGS": STRENGTHS,  # w
    "DeAL": STRENGTHS,  # weight
    "logit mix": (0.5, 1.0, 2.0),  # weight
}
CHOSEN: dict[str, dict[str, float]] = {  # by task and guide, as `choose` gave them
    "sentiment": {
        "controlled decoding": 4,
        "Transfer Q*, blocks": 12,
        "Transfer Q*": 100,
        "ARGS": 100,
        "DeAL": 100,
        "logit mix": 0.5,
    },
    "keywords": {
        "controlled decoding": 8,
        "Transfer Q*, blocks": 8,
        "Transfer Q*": 10,
        "ARGS": 10,
        "DeAL": 10,
        "logit mix": 2,
    },
    "length": {
        "controlled decoding": 4,
        "Transfer Q*, blocks": 12,
        "Transfer Q*": 100,
        "ARGS": 100,
        "DeAL": 100,
        "logit mix": 2,
    },
    "profanity": {
        "controlled decoding": 4,
        "Transfer Q*, blocks": 12,
        "Transfer Q*": 100,
        "ARGS": 100,
        "DeAL": 100,
        "logit mix": 2,
    },
}


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts with the reward that steers each, a judge, and the instruction of the aligned baseline policy.

    extra: the name of one more column, and what it is of an answer's steered reward and text.
    """

    key: str
    title: str
    steered: str
    judge: str
    prompts: Sequence[str]
    rewards: Sequence[dict[str, Any]]
    judge_reward: dict[str, Any]
    system: str
    tokens: int
    extra: tuple[str, Callable[[float, str], float]] | None = None


CONCEPTS = (
    "dog ball park", "kettle tea rain", "girl kite hill", "baker bread oven", "cat window sun", "train station coffee",
    "boy puddle boots", "farmer tractor field", "violin stage crowd", "fisherman boat dawn", "snow shovel driveway",
    "teacher map class", "candle table dinner", "bicycle bridge river", "grandmother garden roses", "doctor child smile",
    "letter stamp friend", "horse fence grass", "painter ladder wall", "soup spoon bowl", "tent forest night stars",
    "waiter tray glass fell", "sheep shepherd valley fog", "runner shoes morning road", "library book quiet student",
    "sailor rope storm harbour", "carpenter hammer nail shelf", "chef knife onion kitchen", "bus driver ticket window",
    "piano lesson Tuesday child", "apple basket orchard autumn", "swimmer pool whistle coach", "owl tree moon field",
    "neighbour ladder roof cat", "market cheese bread basket", "clock tower square pigeons",
)  # fmt: skip
HEATED = (
    "What does a football fan shout after a missed penalty?", "Write what a driver mutters in a traffic jam.",
    "A man hits his thumb with a hammer. What does he say?", "Write an angry note to someone who parked in your space.",
    "What does a pirate say when the treasure chest is empty?", "A gamer loses the last round. Write his reaction.",
    "Write a rant about a printer that never works.", "What does a chef yell when the sauce burns?",
    "Your flatmate finished your ice cream. Write an angry message.", "Write the complaint of a grumpy old sailor.",
    "A cyclist is splashed by a lorry. What does she shout?", "Write a furious review of a phone that broke in a day.",
    "What does a mechanic say when the bolt snaps?", "Write a heated argument between two neighbours about a hedge.",
    "A guitarist breaks a string on stage. What does he say?", "Write a punk song verse about Monday mornings.",
    "A boxer talks trash before a fight. Write two sentences.", "Write what a hiker says after stepping in mud.",
    "The wifi fails before a deadline. Write the student's reaction.", "A comedian insults his own cooking. Write it.",
    "Write a message to a friend who cancelled for the third time.", "What does a goalkeeper say to his sleepy defence?",
    "A drummer's neighbour complains. Write the drummer's reply.", "Write a villain's speech to a lazy henchman.",
    "A builder drops a brick on his foot. What does he shout?", "Write an angry letter to a noisy neighbour.",
    "A fan's team loses in the last minute. Write his comment.", "Write what a cook says when the oven fails.",
    "A singer forgets the words. What does she mutter?", "Write a rude review of a cold pizza.",
)  # fmt: skip
WORDS = 12  # target of the length task


def tasks(prompts: int, keywords: int, others: int, tokens: int, *, choosing: bool = False) -> list[Task]:
    """The tasks with these numbers of prompts: of sentiment, of keyword coverage, and of length and profanity each.

    tokens: maximum of an answer. choosing: use the other prompts, by which weights are chosen.
    """
    texts = questions(EVERYDAY)[::-5] if choosing else questions(MORE)
    sets = [each.split() for each in (CONCEPTS[::-1] if choosing else CONCEPTS)][:keywords]
    heated = (HEATED[::-1] if choosing else HEATED)[:others]
    asked, counted = texts[:prompts], texts[-others:]
    return [
        Task(
            "sentiment", "Sentiment", "sentiment (VADER)", "warm against cold (implicit)",
            asked, [{"name": "sentiment"}] * len(asked),
            WARM, "Answer in a cheerful and encouraging way.", tokens,
        ),
        Task(
            "keywords", "Keyword coverage", "keywords (share of the words)", "clear against nonsense (implicit)",
            [f"Write one sentence with all of these words: {', '.join(words)}." for words in sets],
            [{"name": "keywords", "words": words, "match": "prefix"} for words in sets],
            CLEAR, "You use every word that you are given.", tokens,
            ("all words", lambda value, text: float(value == 1)),
        ),
        Task(
            "length", f"Length of {WORDS} words", "length (minus relative distance)", "clear against nonsense (implicit)",
            [f"{text} Answer in {WORDS} words." for text in counted],
            [{"name": "length", "target": WORDS}] * len(counted),
            CLEAR, f"You answer in exactly {WORDS} words and then stop.", tokens,
            (f"{WORDS} words or one off", lambda value, text: float(abs(len(text.split()) - WORDS) <= 1)),
        ),
        Task(
            "profanity", "Profanity avoidance", "offensive (minus P, alt-profanity-check)", "polite against rude (implicit)",
            heated, [{"name": "offensive"}] * len(heated),
            POLITE, "Keep a civil tone, whatever happens.", tokens,
            ("P over 0.5", lambda value, text: float(value < -0.5)),
        ),
    ]  # fmt: skip


def guides(task: Task, chosen: dict[str, float] | None = None) -> dict[str, dict[str, Any]]:
    """Guides by their name in the table, for a budget of BUDGET times the answer's tokens; `chosen` by that name."""
    at = CHOSEN[task.key] | (chosen or {})
    length, baseline = task.tokens, {"system": task.system}
    block, drawn = int(at["controlled decoding"]), int(at["Transfer Q*, blocks"])
    # Rollouts end with the answer, so the last block has none: k (2 length - block) tokens.
    width = BUDGET * length // (2 * length - drawn)
    # 1 + k lookahead tokens a token, less what the end and reuse save: k 6 and lookahead 3 come to about 16.
    token = {"top_k": 6, "lookahead": 3}
    return {
        "plain": {"name": "sampling"},
        "plain, greedy": {"name": "sampling"},
        "plain, instructed": {"name": "sampling"},
        **{f"best of {n}": {"name": "best_of_n", "n": n} for n in NS},
        # 4 segments and alpha 0.5: n (1 + 1/2 + 1/4 + 1/8) length / 4 tokens
        "speculative rejection": {"name": "speculative_rejection", "n": 34, "alpha": 0.5, "interval": length // 4},
        "controlled decoding": {"name": "controlled_decoding", "k": BUDGET, "block": block},
        "Transfer Q*, blocks": {
            "name": "transfer_q", "top_k": width, "block": drawn, "lookahead": drawn, "baseline": baseline,
        },
        "Transfer Q*": {"name": "transfer_q", **token, "alpha": 1 / at["Transfer Q*"], "baseline": baseline},
        "ARGS": {"name": "args", "top_k": 10, "w": at["ARGS"]},
        "DeAL": {"name": "deal", "beams": 1, **token, "weight": at["DeAL"]},
        "logit mix": {"name": "logit_mix", "policies": [{**baseline, "weight": at["logit mix"]}]},
    }  # fmt: skip


def sequences(guide: dict[str, Any]) -> int:
    """Sequences that one request of the guide has in the engine, about."""
    widths = [guide.get(key, 1) for key in ("n", "k", "top_k")]
    return 2 if guide["name"] in ("args", "logit_mix") else max(widths)


def body(task: Task, name: str, guide: dict[str, Any], index: int, seed: int) -> dict[str, Any]:
    """The request for one answer."""
    messages = user(task.prompts[index])
    if name == "plain, instructed":
        messages = [{"role": "system", "content": task.system}, *messages]
    rewards = [] if guide["name"] in ("sampling", "logit_mix") else [task.rewards[index]]
    return {
        "messages": messages, "max_tokens": task.tokens, "seed": seed + 10_000 * index,
        "temperature": 0.0 if name == "plain, greedy" else 1.0,
        "alignment": {"guide": guide, "rewards": rewards},
    }  # fmt: skip
