"""Part of bench_guides.py: speculative rejection against best-of-n with the same seeds.

Alpha and interval of the second setting are chosen by replaying rejections over pools drawn for other prompts
(server/offline/evaluate/partial_metrics.py): the largest mean reward that keeps to a share of best-of-n's tokens.
"""

from itertools import product
from typing import Any

import numpy as np
from asking import EVERYDAY, MORE, Raw, ask, questions, user
from measured import interval, verdict
from report import Results, Target

from guiderail.guides.core.types import Message, SamplingSpec
from guiderail.server.offline.evaluate.draw import draw
from guiderail.server.offline.evaluate.partial import score_beginnings
from guiderail.server.offline.evaluate.partial_metrics import reject
from guiderail.server.offline.options import NamedReward
from guiderail.server.state import ServerState

N, TOKENS = 32, 64
DEFAULT = (0.5, 16)  # alpha, interval: four segments
GRID = list(product((0.3, 0.4, 0.5, 0.6, 0.7), (8, 12, 16, 24, 32)))
SHARE = (
    0.45  # of best-of-n's tokens in the replay, which does not count tokens generated while partial answers are scored
)
REWARDS = ("sentiment", "harmless")


async def choose(state: ServerState, reward: str, prompts: int) -> dict[str, Any]:
    """Alpha and interval for a reward, from the first prompts of more.jsonl, with their results in the replay."""
    conversations = [(Message("user", text),) for text in questions(MORE)[:prompts]]
    pools = await draw(state, conversations, N, SamplingSpec(TOKENS, seed=77))
    checkpoints = sorted({at for _, interval in GRID for at in range(interval, TOKENS, interval)})
    pools, final, partial = await score_beginnings(state, pools, NamedReward({"name": reward}), checkpoints)
    lengths = np.array([[len(answer.token_ids) for answer in pool.answers] for pool in pools])
    rows = []
    for alpha, every in GRID:
        columns = [checkpoints.index(at) for at in range(every, TOKENS, every)]
        ends = [
            reject(f, p[:, columns], length, list(range(every, TOKENS, every)), alpha)
            for f, p, length in zip(final, partial, lengths, strict=True)
        ]
        reached = np.mean([f[alive].max() for f, (alive, _) in zip(final, ends, strict=True)])
        share = sum(tokens for _, tokens in ends) / lengths.sum()
        rows.append({"alpha": alpha, "interval": every, "reward": float(reached), "share": float(share)})
    allowed = [row for row in rows if row["share"] <= SHARE]
    chosen = max(allowed, key=lambda row: row["reward"])
    return {**chosen, "best_of_n": float(final.max(axis=1).mean()), "grid": rows}


async def rejection(state: ServerState, raw: Raw, prompts: int, choosing: int) -> Results:
    """Mean reward and tokens of speculative rejection over those of best-of-n, by two rewards."""
    texts = questions(EVERYDAY)[:prompts]

    def run(text: str, number: int, guide: dict[str, Any], rewards: list[dict[str, Any]], **more: Any) -> Any:
        alignment = {"guide": guide, "rewards": rewards, **more}
        return ask(state, messages=user(text), max_tokens=TOKENS, seed=10_000 * number, alignment=alignment)

    data: dict[str, Any] = {"best_of_n": [], "chosen": {}, "rejection": {}}
    for number, text in enumerate(texts):

        async def best(number: int = number, text: str = text) -> dict[str, Any]:
            rewards = [{"name": REWARDS[0]}, {"name": REWARDS[1], "weight": 0}]  # one draw serves both
            response = await run(text, number, {"name": "best_of_n", "n": N}, rewards, return_candidates=True)
            report = response["alignment"]
            values = {name: [c["rewards"][name] for c in report["choices"][0]["candidates"]] for name in REWARDS}
            return {"values": values, "tokens": report["spend"]["tokens_generated"], "s": response["wall_s"]}

        data["best_of_n"].append(await raw.get(f"rejection/best/{number}", best))
    for name in REWARDS:
        data["chosen"][name] = await raw.get(
            f"rejection/choose/{name}", lambda name=name: choose(state, name, choosing)
        )
        chosen = (data["chosen"][name]["alpha"], data["chosen"][name]["interval"])
        for alpha, every in dict.fromkeys((DEFAULT, chosen)):
            rows = []
            for number, text in enumerate(texts):

                async def rejected(
                    number: int = number, text: str = text, name: str = name, alpha: float = alpha, every: int = every
                ) -> dict[str, Any]:
                    guide = {"name": "speculative_rejection", "n": N, "alpha": alpha, "interval": every}
                    response = await run(text, number, guide, [{"name": name}])
                    report = response["alignment"]
                    return {
                        "value": report["choices"][0]["rewards"][name],
                        "tokens": report["spend"]["tokens_generated"],
                        "s": response["wall_s"],
                    }

                rows.append(await raw.get(f"rejection/{name}/{alpha}/{every}/{number}", rejected))
            data["rejection"][f"{name}/{alpha}/{every}"] = rows
    lines, targets = _lines(data, len(texts), choosing)
    return lines, data, targets


def _lines(data: dict[str, Any], prompts: int, choosing: int) -> tuple[list[str], list[Target]]:
    lines = [
        f"{prompts} prompts (deploy/prompts/everyday.jsonl), n {N}, answers of at most {TOKENS} tokens, the same seeds; one "
        f"request at a time. Beside alpha {DEFAULT[0]} with checkpoints every {DEFAULT[1]} tokens stands, for each reward, the setting "
        f"that did best on {choosing} other prompts (deploy/prompts/more.jsonl) within {SHARE} of the tokens. A ratio of means "
        "depends on where a reward's zero is; the share of best-of-n's gain over a plain answer that is kept does not. "
        "95 % intervals are bootstraps over prompts.",
        "",
        "| reward | alpha | interval | plain | best-of-32 | rejection | ratio | target | | gain kept | tokens, share | target | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    targets = []
    tokens_of_best = np.array([row["tokens"] for row in data["best_of_n"]], float)
    for key, rows in data["rejection"].items():
        name, alpha, every = key.split("/")
        values = np.array([row["values"][name] for row in data["best_of_n"]])
        plain, best, found = values.mean(axis=1), values.max(axis=1), np.array([row["value"] for row in rows])
        tokens = np.array([row["tokens"] for row in rows], float)
        ratio = _ratio(found, best)
        kept = _ratio(found - plain, best - plain)
        share = _ratio(tokens, tokens_of_best)
        setting = f"speculative rejection (alpha {alpha}, interval {every}) / best-of-{N}, {name}"
        targets.append(Target(f"reward, {setting}", ">= 0.98", f"{ratio[0]:.3f}", ratio[0] >= 0.98))
        targets.append(Target(f"tokens, {setting}", "<= 0.5", f"{share[0]:.3f}", share[0] <= 0.5))
        lines.append(
            f"| {name} | {alpha} | {every} | {plain.mean():.3f} | {best.mean():.3f} | {found.mean():.3f} "
            f"| {ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f}) | >= 0.98 | {verdict(ratio[0], 0.98, at_most=False)} "
            f"| {kept[0]:.3f} ({kept[1]:.3f}-{kept[2]:.3f}) | {share[0]:.3f} | <= 0.5 "
            f"| {verdict(share[0], 0.5, at_most=True)} |"
        )
    return lines, targets


def _ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float, float]:
    """Ratio of means over prompts, with its interval."""

    def how(picks: np.ndarray) -> np.ndarray:
        rows = picks.astype(int)
        return above[rows].mean(axis=-1) / below[rows].mean(axis=-1)

    return interval(list(range(len(above))), how)
