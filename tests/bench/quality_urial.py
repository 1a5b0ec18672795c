"""Part of bench_quality.py: a base model with the prompter urial against the same model alone.

Alone, the model continues the question as raw text (/v1/completions). With urial it sees a style's instruction and
examples first. Both sample as the paper does (arXiv 2312.01552: temperature 0.3, repetition penalty 1.1). Answers are
scored afterwards by another model and by rules; nothing steers, except in the last row of the table.
"""

import time
from typing import Any

import numpy as np
from asking import HEAD, LIMITS, MORE, Raw, ask, at_once, questions, user
from measured import interval
from quality_judges import CLEAR
from quality_metrics import diversity

from guiderail.server.offline.offline_state import offline
from guiderail.server.requests.schemas import ScoreRequest
from guiderail.server.requests.score import score, scoring
from guiderail.server.settings import Settings

BASE = "gemma3-270m"
TOKENS = 96
SAMPLING = {"max_tokens": TOKENS, "temperature": 0.3, "repetition_penalty": 1.1}
METHODS: dict[str, dict[str, Any] | None] = {  # alignment; None: the question as raw text
    "base model alone": None,
    "urial, balanced": {"prompter": {"name": "urial", "style": "balanced"}},
    "urial, helpful": {"prompter": {"name": "urial", "style": "helpful"}},
    "urial, brief": {"prompter": {"name": "urial", "style": "brief"}},
    "urial, balanced, best of 8 by keywords": {
        "prompter": {"name": "urial", "style": "balanced"},
        "guide": {"name": "best_of_n", "n": 8},
        "rewards": [{"name": "keywords", "match": "prefix"}],
    },
}
SCORERS: dict[str, dict[str, Any]] = {
    "clear": CLEAR,
    "harmless head": {"name": "harmless"},
    "keywords": {"name": "keywords", "match": "prefix"},
    "whole sentence": {"name": "regex"},
}


async def urial(raw: Raw, prompts: int, seed: int) -> tuple[list[str], dict[str, Any]]:
    """Lines of the page and metrics by method. Starts two engines, one after the other."""
    texts = questions(MORE)[:prompts]
    methods: dict[str, Any] = {}
    async with offline(Settings(model=BASE, rewards=["keywords"], limits=LIMITS)) as state:

        async def answer_all(alignment: dict[str, Any] | None) -> dict[str, Any]:
            async def one(index: int) -> dict[str, Any]:
                common = {**SAMPLING, "seed": seed + 10_000 * index}
                if alignment is None:
                    response = await ask(state, prompt=texts[index] + "\n", **common)
                    text = response["choices"][0]["text"]
                else:
                    response = await ask(state, messages=user(texts[index]), alignment=alignment, **common)
                    text = response["choices"][0]["message"]["content"]
                choice, spend = response["choices"][0], response["alignment"]["spend"]
                return {"text": text, "finish": choice["finish_reason"], "generated": spend["tokens_generated"]}

            started = time.perf_counter()
            answers = await at_once([lambda i=i: one(i) for i in range(len(texts))], 24)
            return {"answers": answers, "seconds": (time.perf_counter() - started) / len(texts)}

        for name, alignment in METHODS.items():
            methods[name] = await raw.get(f"urial/{name}", lambda a=alignment: answer_all(a))
    rewards = ["implicit", "keywords", "regex"]
    async with offline(Settings(reward={"harmless": {"path": HEAD}}, rewards=rewards, limits=LIMITS)) as state:

        async def score_all(answers: list[dict[str, Any]]) -> list[dict[str, float]]:
            request = {
                "inputs": [
                    {"messages": user(text), "answers": [answer["text"]]}
                    for text, answer in zip(texts, answers, strict=True)
                ],
                "rewards": [{**spec, "label": label} for label, spec in SCORERS.items()],
            }
            response = await score(state, scoring(state, ScoreRequest.model_validate(request)))
            return [row["answers"][0]["rewards"] for row in response["data"]]

        for name, found in methods.items():
            found["scores"] = await raw.get(f"urial/{name}/scores", lambda a=found["answers"]: score_all(a))
    return _lines(methods, len(texts)), methods


def _lines(methods: dict[str, Any], prompts: int) -> list[str]:
    lines = [
        f"{BASE} (base model), {prompts} prompts of deploy/prompts/more.jsonl, at most {TOKENS} tokens, temperature 0.3, "
        "repetition penalty 1.1. Alone: the question as raw text to continue. Clear: SmolLM2-135M-Instruct's likelihood ratio a "
        "token under `one clear sentence` against `words that make no sense` (quality_judges.py). The harmless head is the "
        "bundled one; it is weak. Keywords: share of the question's content words. 95 % intervals are bootstraps over prompts. "
        "These are scorers: a gain in one is no alignment or safety.",
        "",
        "| method | clear | harmless head | keywords | ends as a sentence | stopped by itself | distinct | words | tokens generated "
        "| s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in methods.items():
        answers = found["answers"]
        cells = [name]
        for label in SCORERS:
            middle, low, high = interval([row[label] for row in found["scores"]])
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        cells.append(f"{np.mean([answer['finish'] == 'stop' for answer in answers]):.2f}")
        cells.append(f"{np.mean([diversity(answer['text']) for answer in answers]):.2f}")
        cells.append(f"{np.mean([len(answer['text'].split()) for answer in answers]):.1f}")
        cells.append(f"{np.mean([answer['generated'] for answer in answers]):.0f}")
        cells.append(f"{found['seconds']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
