"""`guiderail evaluate partial-correlation`: tau against scipy, rejection against the guide itself, and the command."""

import argparse
import asyncio
import json
import math
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contexts import final as final_of
from contexts import run as run_guide
from fakes import ScriptedEngine, make_state
from scipy import stats
from serving import Live
from tabular import random_policy, random_reward
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides import TextReward
from guiderail.guides.best_of_n import BestOfN
from guiderail.guides.core.errors import GuiderailError
from guiderail.guides.core.seeds import Seeds
from guiderail.guides.core.types import Delta, Message, SamplingSpec
from guiderail.guides.speculative_rejection import SpeculativeRejection
from guiderail.server.offline import offline_state as offline
from guiderail.server.offline import options
from guiderail.server.offline.evaluate import partial
from guiderail.server.offline.evaluate import partial_metrics as pf
from guiderail.server.offline.prompt_file import read_prompts

EVERYDAY = Path(__file__).parents[3] / "deploy" / "prompts" / "everyday.jsonl"
ASK = (Message("user", "x"),)


class Letters(ScriptedEngine):
    """Tokens that decode to what was written: one letter each."""

    async def deltas(self, *args: Any) -> AsyncGenerator[Delta, None]:
        async for delta in super().deltas(*args):
            yield replace(delta, token_ids=tuple(map(ord, delta.text)))


class Weight(TextReward):
    """Letters of the text, each worth its place in the alphabet; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score_text(self, prompt: str, answer: str, params: Any) -> float:
        self.asked.append(answer)
        return float(sum(ord(c) - ord("a") for c in answer))


def spell(seed: int) -> list[str]:
    """An answer of 2 to 5 letters."""
    rng = np.random.default_rng(seed)
    return [chr(ord("a") + int(z)) for z in rng.integers(0, 8, int(rng.integers(2, 6)))]


class TestFigures:
    @pytest.mark.parametrize("levels", [2, 3, 10, 1000])
    def test_tau_is_scipys(self, levels: int) -> None:
        rng = np.random.default_rng(levels)
        for n in (2, 3, 7, 40):
            for _ in range(20):
                x, y = rng.integers(0, levels, (2, n)).astype(float)
                expected = stats.kendalltau(x, y, variant="b").statistic
                assert pf.kendall(x, y) == pytest.approx(expected, nan_ok=True)

    def test_tau_knows_its_extremes(self) -> None:
        x = np.array([3.0, 1.0, 2.0])
        assert pf.kendall(x, 10 * x) == pytest.approx(1)
        assert pf.kendall(x, -x) == pytest.approx(-1)
        assert math.isnan(pf.kendall(x, np.zeros(3)))

    def test_rejection_keeps_the_first_of_equals_and_one_at_least(self) -> None:
        assert pf.best(np.array([1.0, 2.0, 2.0, 2.0]), 0.5).tolist() == [1, 2]
        assert pf.best(np.array([1.0, 3.0]), 0.9).tolist() == [1]
        assert pf.best(np.array([1.0, 3.0, 2.0]), 0.0).tolist() == [0, 1, 2]

    @pytest.mark.parametrize(("alpha", "checkpoints"), [(0.5, (2, 4, 6)), (0.3, (2, 4, 6)), (0.8, (3, 6)), (0.0, (2,))])
    async def test_rejection_is_the_guides(self, alpha: float, checkpoints: tuple[int, ...]) -> None:
        horizon, n = 7, 9
        policy = random_policy(20, horizon=horizon, spread=0.7)
        whole = random_reward(policy, 3)

        def so_far(ids: Any) -> float:
            return float(np.sin(1 + sum((t + 1) * z for t, z in enumerate(ids))))

        async def play(guide: Any, seed: int) -> Any:
            scores = Scores({"r": whole}, so_far)
            ctx = tabular_context(TabularEngine.of(policy), scores, sampling=SamplingSpec(horizon, seed=seed))
            return final_of(await run_guide(guide, ctx)), ctx.spend.tokens_generated

        for seed in range(12):
            rows = [c.token_ids for c in (await play(BestOfN(BestOfN.Params(n=n)), seed))[0].candidates]
            final = np.array([whole[ids] for ids in rows])
            parts = [[so_far(ids[:c]) if len(ids) > c else whole[ids] for c in checkpoints] for ids in rows]
            lengths = np.array([len(ids) for ids in rows])
            alive, tokens = pf.reject(final, np.array(parts), lengths, checkpoints, alpha)
            params = SpeculativeRejection.Params(n=n, alpha=alpha, interval=checkpoints[0])
            end, spent = await play(SpeculativeRejection(params), seed)
            assert end.chosen == alive[final[alive].argmax()]
            assert spent == tokens

    def test_what_is_kept_and_saved(self) -> None:
        """Partial rewards that are right keep all; the opposite keeps what is left of the pool."""
        final = np.array([[0.0, 1.0, 2.0, 3.0]] * 3)
        lengths = np.full((3, 4), 10)
        right = pf.partial_metrics(final, final[:, :, None], lengths, [4], 0.5, 0)
        assert right["checkpoints"][0]["tau"] == {"value": 1.0, "low": 1.0, "high": 1.0, "prompts": 3}
        assert right["checkpoints"][0]["winner_survives"]["value"] == 1
        assert right["all_checkpoints"]["gain_kept"]["value"] == 1
        assert right["all_checkpoints"]["tokens_share"]["value"] == pytest.approx((2 * 10 + 2 * 4) / 40)
        wrong = pf.partial_metrics(final, -final[:, :, None], lengths, [4], 0.5, 0)
        assert wrong["checkpoints"][0]["tau"]["value"] == -1
        assert wrong["checkpoints"][0]["winner_survives"]["value"] == 0
        assert wrong["all_checkpoints"]["reward"]["value"] == 1
        assert wrong["all_checkpoints"]["gain_kept"]["value"] == pytest.approx((1 - 1.5) / (3 - 1.5))

    def test_a_reward_that_does_not_tell_answers_apart(self) -> None:
        metrics = pf.partial_metrics(np.ones((3, 4)), np.ones((3, 4, 1)), np.full((3, 4), 9), [4], 0.5, 0)
        row = metrics["checkpoints"][0]
        assert math.isnan(row["tau"]["value"])
        assert row["tau"]["prompts"] == 0
        assert row["winner_survives"]["value"] == 1
        assert math.isnan(metrics["all_checkpoints"]["gain_kept"]["value"])

    def test_intervals_cover_the_truth(self) -> None:
        random, hits = np.random.default_rng(0), 0
        for _ in range(60):
            hits += (found := pf.band(random.random(40), random))["low"] <= 0.5 <= found["high"]
        assert hits >= 51, "60 intervals of 95 %: fewer than 51 hits would be a matter of 0.1 %"


class TestCommand:
    async def test_beginnings_are_what_was_written_by_then(self) -> None:
        reward = Weight()
        state = make_state(Letters(script=spell), {"weight": reward})
        metrics = await partial.evaluate_partial(
            state, [ASK] * 2, options.parse_reward("weight"), 3, [1, 3], 0.5, SamplingSpec(8, seed=5)
        )
        texts = ["".join(spell(seed)) for prompt in (0, 1) for seed in Seeds(5, prompt).stream(3) if seed is not None]
        assert sorted(reward.asked) == sorted(part for text in texts for part in (text[:1], text[:3], text))
        values = np.array([[reward.score_text("", t, None) for t in texts[i : i + 3]] for i in (0, 3)])
        for row in metrics["checkpoints"]:
            begun = np.array([reward.score_text("", t[: row["tokens"]], None) for t in texts]).reshape(2, 3)
            taus = [stats.kendalltau(*pair).statistic for pair in zip(begun, values, strict=True)]
            assert row["tau"]["value"] == pytest.approx(np.nanmean(taus))
            assert row["ended"] == np.mean([len(text) <= row["tokens"] for text in texts])
        assert metrics["all_checkpoints"]["best_of_m"]["value"] == values.max(axis=1).mean()
        assert metrics["tokens_per_answer"] == np.mean([len(text) for text in texts])

    def test_the_whole_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def run(settings: Any, main: Any, *, engine: bool = True) -> int:
            assert settings.rewards == ["weight"]
            return asyncio.run(main(make_state(Letters(script=spell), {"weight": Weight()})))

        monkeypatch.setattr(offline, "run_offline", run)
        out = tmp_path / "o"
        assert partial.run(parsed("--limit", "7", "-m", "8", "--max-tokens", "8", "--out", str(out))) == 0
        report = json.loads((out / "report.json").read_text())
        assert [row["tokens"] for row in report["checkpoints"]] == [2, 4, 6]
        assert report["checkpoints"][2]["tau"]["value"] == 1, "every answer has ended by then"
        assert report["prompts"]["prompts"] == 7
        assert 0 < report["all_checkpoints"]["tokens_share"]["value"] < 1
        assert (out / "partial.png").read_bytes()[:4] == b"\x89PNG"
        assert "of the gain over plain" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "flags",
        [
            ("--checkpoints", "0,4"), ("--checkpoints", "64"), ("--checkpoints", "x"), ("--alpha", "1"),
            ("-m", "1"), ("--limit", "1"),
        ],
    )  # fmt: skip
    def test_numbers_that_make_no_sense(self, flags: tuple[str, str], tmp_path: Path) -> None:
        with pytest.raises(GuiderailError, match=flags[0].replace("-m", "-m|at least")):
            partial.run(parsed("--out", str(tmp_path / "o"), *flags))


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    partial.add_arguments(parser)
    return parser.parse_args(["--prompts", str(EVERYDAY), "--reward", "weight", *words])


@pytest.mark.slow
async def test_the_real_engine(live: Live) -> None:
    prompts = read_prompts(EVERYDAY).prompts[:2]
    metrics = await partial.evaluate_partial(
        live.state, prompts, options.parse_reward("sentiment"), 4, [4, 8], 0.5, SamplingSpec(12, seed=3)
    )
    assert all(-1 <= row["tau"]["value"] <= 1 for row in metrics["checkpoints"] if row["tau"]["prompts"])
    every = metrics["all_checkpoints"]
    assert every["plain"]["value"] <= every["reward"]["value"] <= every["best_of_m"]["value"]
    assert live.state.engine.num_running() == 0
