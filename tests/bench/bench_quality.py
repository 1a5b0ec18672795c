"""Effects of guides on answers: `make bench-quality` (about 20 minutes on 2 cores; ARGS="urial" for the base model).

tasks    sentiment, keyword coverage, length and profanity avoidance: plain sampling, best-of-n, and every guide at about
         the tokens of best-of-16, with SmolLM2-135M-Instruct; a table and a picture
urial    the base model Gemma 3 270M with the prompter urial against the same model alone
choose   the grid on other prompts from which the guides' weights were chosen (prints it)

Requests take the path of HTTP requests, inside this process. Raw results go to --raw as they come; --resume
continues from them. Rewards are scorers: a gain in one is a gain in that scorer, and no more.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from asking import LIMITS, Raw, ask, at_once, publish, user
from quality_judges import check
from quality_metrics import metrics, picture, table
from quality_tasks import BUDGET, GRID, SEQUENCES, Task, body, guides, sequences, tasks
from quality_urial import urial
from report import ROOT

from guiderail.server.offline.offline_state import offline
from guiderail.server.requests.schemas import ScoreRequest
from guiderail.server.requests.score import score, scoring
from guiderail.server.settings import Settings
from guiderail.server.state import ServerState

EVEN = f"best of {BUDGET}"
PICTURE = ROOT / "benchmarks" / "quality.png"


def settings() -> Settings:
    """The default model with every scorer that steers or judges."""
    return Settings(rewards=["sentiment", "keywords", "length", "offensive", "implicit"], limits=LIMITS)


async def answer_all(state: ServerState, task: Task, name: str, guide: dict[str, Any], seed: int) -> dict[str, Any]:
    """One method's answers to all prompts of a task, scored by the steering reward and the judge, and the seconds."""

    async def one(index: int) -> dict[str, Any]:
        response = await ask(state, **body(task, name, guide, index, seed))
        report = response["alignment"]
        return {
            "text": response["choices"][0]["message"]["content"],
            "finish": response["choices"][0]["finish_reason"],
            "kl": report["choices"][0]["diagnostics"]["kl"],
            "generated": report["spend"]["tokens_generated"] + report["spend"]["mixed_tokens"],
        }

    started = time.perf_counter()
    answers = await at_once(
        [lambda i=i: one(i) for i in range(len(task.prompts))], max(2, SEQUENCES // sequences(guide))
    )
    seconds = (time.perf_counter() - started) / len(answers)

    async def scored(index: int) -> list[float]:
        request = {
            "inputs": [{"messages": user(task.prompts[index]), "answers": [answers[index]["text"]]}],
            "rewards": [{**task.rewards[index], "label": "steered"}, {**task.judge_reward, "label": "judge"}],
        }
        response = await score(state, scoring(state, ScoreRequest.model_validate(request)))
        values = response["data"][0]["answers"][0]["rewards"]
        return [values["steered"], values["judge"]]

    values = await at_once([lambda i=i: scored(i) for i in range(len(answers))], SEQUENCES // 2)
    for answer, (steered, judge) in zip(answers, values, strict=True):
        answer["steered"], answer["judge"] = steered, judge
    return {"seconds": seconds, "answers": answers}


async def compare(state: ServerState, raw: Raw, some: Sequence[Task], seed: int) -> tuple[list[str], dict[str, Any]]:
    """Every method on every task; lines of the page, and the metrics by task and method."""
    results: dict[str, dict[str, Any]] = {}
    missing: set[str] = set()
    lines: list[str] = []
    for task in some:
        found = {}
        for name, guide in guides(task).items():
            if guide["name"] not in state.guides:
                missing.add(guide["name"])
                continue
            found[name] = await raw.get(
                f"{task.key}/{name}", lambda n=name, g=guide, t=task: answer_all(state, t, n, g, seed)
            )
        even = found[EVEN]["answers"]
        results[task.key] = {
            name: {**metrics(task, each["answers"], even), "seconds": each["seconds"], "guide": guides(task)[name]}
            for name, each in found.items()
        }
        lines += table(task, results[task.key], EVEN)
    if missing:
        lines += [f"Not installed, so not measured: {', '.join(sorted(missing))}.", ""]
    return lines, results


def notes(judged: dict[str, list[int]]) -> list[str]:
    """Notes on reading the tables."""
    right = ", ".join(f"{name} {good} of {pairs}" for name, (good, pairs) in judged.items())
    return [
        f"SmolLM2-135M-Instruct. Guides are set to about the tokens of best-of-{BUDGET}; their actual use is in the table (ARGS "
        "spends reward calls instead; logit mix only the other policy's tokens). 95 % intervals are bootstraps over prompts, "
        f"`less {EVEN}` is paired. KL is the bound of the response's diagnostics, summed over a guide's selections; '-': "
        "no valid bound is known. Distinct: ARGS' product of distinct 2-, 3- and "
        "4-grams. Seconds: time of all prompts, many at once, over their number; other work may have run at the same time "
        "(`make bench-guides` measures speed). `plain, instructed` has the system "
        "message that is the baseline policy of Transfer Q* and the other policy of logit mix; token-level guides take the best "
        "token at each step, so their control without a reward is `plain, greedy`. Weights and blocks "
        "were chosen for each task by the steered reward on 6 or 8 other prompts (`bench_quality.py choose`).",
        "",
        "Judges are `implicit` rewards, the model's own likelihood ratio a token under two system messages. Of pairs written "
        f"by hand they order correctly: {right}. They resemble the instructions, so they favour methods that use those: "
        "Transfer Q*, logit mix and `plain, instructed`. Rewards and judges are scorers: a gain in one of them is not alignment or "
        "safety. The profanity task's prompts are benign and plain answers are seldom rude, so it can show that steering by a "
        "profanity scorer lowers that score, and the effect on another scorer; it says nothing about attacks.",
        "",
    ]


async def choose(state: ServerState, raw: Raw, prompts: int, tokens: int) -> list[str]:
    """For each task and guide the mean steered reward at every value of the grid, and CHOSEN as source code.

    The largest mean is chosen; of equals the first.
    """
    lines, best = [], {}
    for task in tasks(prompts, min(prompts, 6), min(prompts, 6), tokens, choosing=True):
        best[task.key] = {}
        for name, values in GRID.items():
            found = {}
            for value in values:
                guide = guides(task, {name: value})[name]
                if guide["name"] in state.guides:
                    key = f"choose/{task.key}/{name}/{value:g}"
                    made = await raw.get(key, lambda t=task, n=name, g=guide: answer_all(state, t, n, g, 5))
                    metrics_of = [[each[k] for k in ("steered", "judge", "generated")] for each in made["answers"]]
                    found[value] = np.mean(metrics_of, axis=0)
            best[task.key][name] = max(found, key=lambda value: found[value][0])
            cells = (
                f"{value:g}: {row[0]:.3f} (judge {row[1]:.3f}, {row[2]:.0f} tokens)" for value, row in found.items()
            )
            lines.append(f"{task.key}, {name}, {'; '.join(cells)}")
    return [*lines, "CHOSEN = " + repr(best)]


async def main(args: argparse.Namespace) -> None:
    """Run one part."""
    raw = Raw(args.raw, {key: value for key, value in vars(args).items() if key not in OF_THE_RUN}, resume=args.resume)
    few = 2 if args.rehearse else None
    if args.part == "urial":
        lines, data = await urial(raw, few or args.prompts, args.seed)
        title = "URIAL on a base model"
        publish(args.rehearse, "quality_urial", title, 'make bench-quality ARGS="urial"', lines, data)
        return
    async with offline(settings()) as state:
        if args.part == "choose":
            print("\n".join(await choose(state, raw, few or 8, args.tokens)))
            return
        some = tasks(few or args.prompts, few or args.keywords, few or args.others, args.tokens)
        lines, data = await compare(state, raw, some, args.seed)
        judged = await raw.get("judges", lambda: check(state))
    image = args.raw.with_suffix(".png") if args.rehearse else PICTURE
    picture(image, some, data)
    lines = [*notes(judged), *lines, "![](benchmarks/quality.png)"]
    publish(args.rehearse, "quality", "Quality under steering", "make bench-quality", lines, data)


OF_THE_RUN = ("raw", "resume")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("tasks", "urial", "choose"), default="tasks")
    parser.add_argument("--prompts", type=int, default=104, help="prompts of more.jsonl for sentiment and urial (104)")
    parser.add_argument("--keywords", type=int, default=30, help="concept sets (30)")
    parser.add_argument("--others", type=int, default=20, help="prompts of each other task (20)")
    parser.add_argument("--tokens", type=int, default=24, help="maximum number of tokens in an answer (24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", type=Path, default=Path(tempfile.gettempdir()) / "guiderail-bench-quality.jsonl")
    parser.add_argument("--resume", action="store_true", help="continue from the raw results that are there")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes; prints the tables and writes nothing")
    asyncio.run(main(parser.parse_args()))
