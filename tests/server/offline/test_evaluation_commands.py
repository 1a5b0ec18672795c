"""`guiderail rewards evaluate` and `guiderail evaluate curve`: on fakes, on rules, and once on the real engine."""

import asyncio
import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import LetterRenderer, ScriptedEngine, make_state
from offline_commands import Hump, parsed
from serving import Live

from guiderail.guides.core.errors import GuiderailError, PluginError
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.seeds import Seeds
from guiderail.guides.core.types import Message, SamplingSpec
from guiderail.guides.scoring.hedge import hedge
from guiderail.server.engines.null import EngineNeeded, NoEngine
from guiderail.server.offline import offline_state as offline
from guiderail.server.offline import options
from guiderail.server.offline.evaluate import curve
from guiderail.server.offline.evaluate import reward_pairs as rewards
from guiderail.server.offline.prompt_file import read_prompts
from guiderail.server.offline.train.pairs import read_pairs
from guiderail.server.rewards.llm_judge import Judge
from guiderail.server.rewards.rules import Length

EVERYDAY = Path(__file__).parents[3] / "deploy" / "prompts" / "everyday.jsonl"
ASK = (Message("user", "x"),)


def pairs_file(folder: Path) -> Path:
    rows = [
        {
            "messages": [{"role": "user", "content": f"q{i}"}],
            "chosen": "I love it." + " Yes." * (i % 3),
            "rejected": "Bad.",
        }
        for i in range(6)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestRewardsCommand:
    def test_rules_need_no_engine(self, model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [
            "--pairs",
            str(pairs_file(tmp_path)),
            "--reward",
            "sentiment",
            "--limit",
            "5",
            "--out",
            str(tmp_path / "o"),
        ]
        words += ["--reward", '{"name": "length", "target": 1, "label": "brief"}']
        assert rewards.run(parsed(rewards, *words)) == 0
        report = json.loads((tmp_path / "o" / "report.json").read_text())
        assert report["pairs"] | {"sha256": ""} == {"file": "pairs.jsonl", "sha256": "", "pairs": 5, "left_out": {}}
        assert report["rewards"]["sentiment"]["accuracy_95"]["value"] == 1
        assert report["rewards"]["brief"]["accuracy_95"]["value"] == 0
        assert report["rewards"]["brief"]["reward"] == {"name": "length", "target": 1, "unit": "words"}
        assert report["longer_wins"]["value"] == 1
        for name in ("1-sentiment.png", "2-brief.png", "accuracy.png"):
            assert (tmp_path / "o" / name).read_bytes()[:4] == b"\x89PNG"
        out = capsys.readouterr()
        assert "sentiment" in out.out
        assert "engine" not in out.err

    async def test_a_reward_that_needs_the_engine_says_so_first(self, tmp_path: Path) -> None:
        engine, length = NoEngine(), Length()
        judge = Judge()
        await judge.start(Services(engine, LetterRenderer()))
        state = make_state(engine, {"judge": judge, "length": length})
        scored: list[int] = []
        original = length._score
        length._score = lambda groups: scored.append(len(groups)) or original(groups)  # type: ignore[method-assign,func-returns-value]
        named = [options.parse_reward(name) for name in ("length", "judge")]
        with pytest.raises(EngineNeeded):
            await rewards.evaluate_rewards(state, named, read_pairs(pairs_file(tmp_path)).pairs)
        assert scored == [1], "the bulk of the pairs was scored in vain"

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_the_engine_is_started_for_it(self, wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        engines: list[bool] = []

        def run(settings: Any, main: Any, *, engine: bool = True) -> int:
            engines.append(engine)
            if engine:
                return 7
            if wrapped:
                raise PluginError("does not start") from EngineNeeded("no engine")
            raise EngineNeeded("no engine")

        monkeypatch.setattr(offline, "run_offline", run)
        words = ["--pairs", str(pairs_file(tmp_path)), "--reward", "judge", "--out", str(tmp_path / "o")]
        assert rewards.run(parsed(rewards, *words)) == 7
        assert engines == [False, True]


class TestCurveCommand:
    async def test_the_figures_are_the_means_over_all_subsets(self) -> None:
        m, ns = 8, [1, 2, 3, 8]
        engine = ScriptedEngine(script=lambda seed: [f"w{seed * 7 % 10}"])
        state = make_state(engine, {"hump": Hump()})
        named = [options.parse_reward("last_digit", "proxy"), options.parse_reward("hump", "gold")]
        metrics = await curve.evaluate_curve(state, [ASK] * 3, named, m, ns, SamplingSpec(4, seed=1))
        pools = [[seed * 7 % 10 for seed in Seeds(1, p).stream(m) if seed is not None] for p in range(3)]
        for i, n in enumerate(ns):
            best = [max(some) for pool in pools for some in combinations(pool, n)]
            assert metrics["proxy"]["value"][i] == pytest.approx(np.mean(best))
            assert metrics["gold"]["value"][i] == pytest.approx(np.mean([-abs(digit - 5) for digit in best]))
            assert metrics["kl"][i] == pytest.approx(math.log(n) - (n - 1) / n)
        for name in ("proxy", "gold"):
            for value, low, high in zip(*(metrics[name][key] for key in ("value", "low", "high")), strict=True):
                assert low <= value <= high
        assert metrics["gold_best"]["n"] < 8
        assert metrics["gold_best"]["largest_n_minus_best"]["high"] < 0, "chasing the digit costs gold"

    def test_hedgetune_recommends_how_hard_to_select(self) -> None:
        """Gold u - u^8 / 2 is largest at N = 6 in expectation; the prompts differ in the rewards' scale alone."""
        u = (np.random.default_rng(0).permuted(np.tile(np.arange(400), (6, 1)), axis=1) + 0.5) / 400
        scale = np.arange(1, 7)[:, None]
        found = curve.hedges(np.exp(u) * scale, u - 0.5 * u**8, 0)
        assert found["best_of_n"]["n"] == pytest.approx(6.0, rel=0.02)
        assert found["best_of_n"]["low"] <= found["best_of_n"]["n"] <= found["best_of_n"]["high"]
        assert found["best_of_n"]["hacked"]
        mu = hedge(np.exp(u[0]), u[0] - 0.5 * u[0] ** 8, "best_of_poisson", 400.0)
        assert found["best_of_poisson"]["mu"] == pytest.approx(mu.theta, rel=1e-6)
        honest = curve.hedges(u, u, 0)
        assert (honest["best_of_n"]["n"], honest["best_of_n"]["hacked"]) == (pytest.approx(400), False)

    def test_bands_cover_the_truth(self) -> None:
        """95 % intervals over 40 prompts hold the expected curve about as often as they say."""
        random, hits = np.random.default_rng(0), 0
        for _ in range(60):
            proxy = random.random((40, 6)) + random.normal(0, 0.5, (40, 1))
            gold = curve.curve_metrics(proxy, proxy, [1, 3], 0)["gold"]
            hits += gold["low"][1] <= 0.75 <= gold["high"][1]
        assert hits >= 51, "60 intervals of 95 %: fewer than 51 hits would be a matter of 0.1 %"

    def test_the_whole_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def run(settings: Any, main: Any, *, engine: bool = True) -> int:
            assert settings.rewards == ["last_digit", "hump"]
            state = make_state(ScriptedEngine(script=lambda seed: [f"w{seed * 7 % 10}"]), {"hump": Hump()})
            return asyncio.run(main(state))

        monkeypatch.setattr(offline, "run_offline", run)
        out = tmp_path / "o"
        words = [
            "--prompts",
            str(EVERYDAY),
            "--proxy",
            "last_digit",
            "--gold",
            '{"name": "hump", "top": 6}',
            "-m",
            "12",
        ]
        assert curve.run(parsed(curve, *words, "--limit", "9", "--out", str(out))) == 0
        report = json.loads((out / "report.json").read_text())
        assert report["ns"] == [1, 2, 4, 8]
        told = capsys.readouterr().out
        assert f'"n": {report["hedge"]["best_of_n"]["n"]:.0f}' in told
        assert f'"mu": {report["hedge"]["best_of_poisson"]["mu"]:.2f}' in told
        assert report["gold_reward"] == {"name": "hump", "top": 6.0}
        assert report["prompts"]["prompts"] == 9
        assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
        assert "gold is largest at N =" in told

    @pytest.mark.parametrize("flags", [("--ns", "1,9"), ("--ns", "two"), ("--ns", "0"), ("-m", "1"), ("--limit", "1")])
    def test_numbers_that_make_no_sense(self, flags: tuple[str, str], tmp_path: Path) -> None:
        words = [
            "--prompts",
            str(EVERYDAY),
            "--proxy",
            "a",
            "--gold",
            "b",
            "-m",
            "8",
            "--out",
            str(tmp_path / "o"),
            *flags,
        ]
        with pytest.raises(GuiderailError, match=flags[0].replace("-m", "-m|at least")):
            curve.run(parsed(curve, *words))


@pytest.mark.slow
async def test_a_curve_from_the_real_engine(live: Live) -> None:
    named = [options.parse_reward("sentiment", "proxy"), options.parse_reward("judge", "gold")]
    prompts = read_prompts(EVERYDAY).prompts[:2]
    metrics = await curve.evaluate_curve(live.state, prompts, named, 4, [1, 2, 4], SamplingSpec(12, seed=3))
    assert metrics["proxy"]["value"] == sorted(metrics["proxy"]["value"]), "the proxy's own curve cannot fall"
    assert all(0 < value < 1 for value in metrics["gold"]["value"])
    assert 0 < metrics["tokens_per_answer"] <= 12
    assert live.state.engine.num_running() == 0
