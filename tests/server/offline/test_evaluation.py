"""Evaluation of rewards on pairs and of best-of-N over a pool: readers, metrics, and both commands on fakes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import ScriptedEngine, make_state
from offline_commands import Hump, parsed

from guiderail.guides.core.errors import GuiderailError, RequestError
from guiderail.guides.core.seeds import Seeds
from guiderail.guides.core.types import PROMPT, Answer, Message, SamplingSpec
from guiderail.server.offline import options
from guiderail.server.offline.evaluate import draw, pair_metrics, reward_report
from guiderail.server.offline.evaluate import reward_pairs as rewards
from guiderail.server.offline.lines import DataError
from guiderail.server.offline.prompt_file import read_prompts

EVERYDAY = Path(__file__).parents[3] / "deploy" / "prompts" / "everyday.jsonl"
ASK = (Message("user", "x"),)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


class TestPrompts:
    def test_both_shapes(self, tmp_path: Path) -> None:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        file = read_prompts(write(tmp_path / "p.jsonl", {"messages": turns}, "", {"prompt": "Once upon"}))
        assert file.prompts == (
            (Message("system", "Be brief."), Message("user", "Hi")),
            (Message(PROMPT, "Once upon"),),
        )
        assert len(file.sha256) == 64

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("{", "not JSON at column 2"),
            ([], "not a JSON object"),
            ({"prompt": "SECRET", "text": ""}, "unknown field 'text'"),
            ({}, "'messages' or 'prompt'"),
            ({"prompt": " "}, "'prompt' is empty"),
            ({"prompt": 3}, "'prompt' must be a string"),
            ({"messages": [{"role": "assistant", "content": "SECRET"}]}, "must end with the user's"),
            ({"messages": [{"role": "tool", "content": "SECRET"}]}, r"messages\[0\]"),
            ('{"prompt": NaN}', "not JSON"),
            ('{"prompt": "SECRET \\ud83d"}', "'prompt' has half of a surrogate pair"),
            ('{"prompt": "SECRET", "prompt": "SECRET"}', "gives a name twice"),
            ("[" * 200_000, "not JSON"),
        ],
        ids=range(12),
    )
    def test_errors_name_the_line_and_quote_no_text(self, row: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"p\.jsonl:3: .*{message}") as caught:
            read_prompts(write(tmp_path / "p.jsonl", {"prompt": "fine"}, "", row))
        assert "SECRET" not in str(caught.value)

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
    @pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "BOM"])
    def test_only_line_feeds_end_lines(self, mark: str, end: str, tmp_path: Path) -> None:
        odd = "one\u2028two\u0085three\x0cfour"
        rows = [json.dumps({"prompt": text}, ensure_ascii=False) for text in (odd, "two")]
        (tmp_path / "p.jsonl").write_bytes((mark + end.join(rows) + end).encode())
        assert [messages[0].content for messages in read_prompts(tmp_path / "p.jsonl").prompts] == [odd, "two"]

    def test_the_shipped_prompts(self) -> None:
        prompts = read_prompts(EVERYDAY).prompts
        assert len({messages[0].content for messages in prompts}) == len(prompts) >= 60
        assert all(len(messages) == 1 and 3 <= len(messages[0].content.split()) <= 20 for messages in prompts)


class TestFigures:
    def test_the_wilson_interval(self) -> None:
        share = pair_metrics.wilson(np.array([1.0] * 8 + [0.0] * 2))
        assert share == {"value": 0.8, "low": pytest.approx(0.4901625), "high": pytest.approx(0.9433178), "pairs": 10}
        assert pair_metrics.wilson(np.ones(5))["high"] == pytest.approx(1)
        assert math.isnan(pair_metrics.wilson(np.array([]))["value"])

    def test_the_wilson_interval_contains_its_share(self) -> None:
        """Of one-sided answers too, where rounding would put 0 or 1 outside of it and no picture could be drawn."""
        for n in range(1, 200):
            for share in (pair_metrics.wilson(np.zeros(n)), pair_metrics.wilson(np.ones(n))):
                assert share["low"] <= share["value"] <= share["high"]

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
    def test_the_temperature_finds_the_scale_of_the_log_odds(self, scale: float) -> None:
        random = np.random.default_rng(0)
        odds = random.normal(0, 2, 20000)
        margins = scale * np.where(random.random(20000) < 1 / (1 + np.exp(-odds)), odds, -odds)
        fitted = pair_metrics.temperature(margins)
        assert fitted == pytest.approx(scale, rel=0.05)
        losses = [np.logaddexp(0, -margins / (fitted * factor)).mean() for factor in (0.98, 1.0, 1.02)]
        assert losses[1] == min(losses)

    def test_there_is_no_temperature_for_chance_or_perfection(self) -> None:
        assert pair_metrics.temperature(np.array([1.0, 2.0])) is None
        assert pair_metrics.temperature(np.array([1.0, -2.0])) is None
        assert pair_metrics.temperature(np.zeros(4)) is None

    def test_length_bias_is_seen(self) -> None:
        random = np.random.default_rng(1)
        lengths = random.integers(1, 90, (400, 2)).astype(float)
        metrics = reward_report.reward_metrics(lengths + random.normal(0, 5, (400, 2)), lengths)
        assert (
            metrics["by_length"]["chosen_longer"]["value"] > 0.9 > 0.1 > metrics["by_length"]["chosen_shorter"]["value"]
        )
        groups = metrics["by_length_difference"]
        assert [g["value"] for g in groups] == sorted(g["value"] for g in groups)
        assert sum(g["pairs"] for g in groups) == 400
        fair = reward_report.reward_metrics(random.normal(0, 1, (400, 2)), lengths)
        assert abs(fair["length"]["pearson_within_pairs"]) < 0.15 < 0.9 < metrics["length"]["pearson_within_pairs"]

    def test_odd_values_are_reported_and_drawn(self, tmp_path: Path) -> None:
        """Constant, perfect and single-pair rewards, with a label that is no file name."""
        same = np.full((6, 2), 3.0)
        perfect = np.array([[2.0, 1.0]] * 6)
        lengths = np.array([[4.0, 4.0]] * 6)
        metrics = {"../a b": same, "perfect": perfect, "one": perfect[:1]}
        report = {
            "pairs": {"pairs": 6, "file": "p.jsonl"},
            "shorter_wins": pair_metrics.wilson(np.full(6, 0.5)),
            "longer_wins": pair_metrics.wilson(np.full(6, 0.5)),
            "rewards": {k: reward_report.reward_metrics(v, lengths[: len(v)]) for k, v in metrics.items()},
        }
        assert report["rewards"]["../a b"]["ties"] == 6
        assert report["rewards"]["../a b"]["accuracy"]["value"] == 0.5
        options.write_report(tmp_path / "new", report)
        reward_report.draw_report(tmp_path / "new", report)
        names = sorted(path.name for path in (tmp_path / "new").iterdir())
        assert names == ["1-.._a_b.png", "2-perfect.png", "3-one.png", "accuracy.png", "report.json"]
        assert json.loads((tmp_path / "new" / "report.json").read_text())["rewards"]["one"]["accuracy"]["se"] is None
        assert "perfect" in reward_report.table(report)


class TestOptions:
    def test_rewards_of_the_command_line(self) -> None:
        assert options.parse_reward("sentiment").spec == {"name": "sentiment"}
        named = options.parse_reward('{"name": "length", "target": 5}', "gold")
        assert (named.spec, named.model) == ({"name": "length", "target": 5, "label": "gold"}, None)
        named = options.parse_reward("good=some/folder,head=1")
        assert (named.spec, named.model) == ({"name": "good"}, {"path": "some/folder", "head": "1"})
        for bad in (
            "{",
            '{"target": 5}',
            "[]=",
            '{"name": "length", "weight": 2}',
            '{"name": "x", "transform": "log"}',
        ):
            with pytest.raises(GuiderailError):
                options.parse_reward(bad)

    def test_settings_hold_these_rewards_alone(self, tmp_path: Path) -> None:
        text = "max_num_seqs: 7\nprofiles: {p: {rewards: [judge]}}\nreward: {a: {path: x}, b: {path: y}}\n"
        (tmp_path / "c.yaml").write_text(text)
        args = parsed(rewards, "--pairs", "p", "--reward", "b", "--out", "o", "--config", str(tmp_path / "c.yaml"))
        named = [options.parse_reward(text) for text in ("b", "new=z", "sentiment", "sentiment")]
        settings = options.settings_for(args, named)
        assert {name: spec.path for name, spec in settings.reward.items()} == {"b": "y", "new": "z"}
        assert (settings.rewards, settings.profiles, settings.max_num_seqs) == (["sentiment"], {}, 7)
        with pytest.raises(GuiderailError, match="two models"):
            options.settings_for(args, [options.parse_reward("a=x"), options.parse_reward("a=y")])

    def test_a_full_folder_is_refused(self, tmp_path: Path) -> None:
        assert options.output_folder(str(tmp_path)) == tmp_path
        (tmp_path / "file").write_text("")
        with pytest.raises(GuiderailError, match="not an empty folder"):
            options.output_folder(str(tmp_path))


class TestDraw:
    async def test_answers_come_in_order_with_their_own_seeds(self) -> None:
        engine = ScriptedEngine(script=lambda seed: [f"w{seed}", " end"])
        state = make_state(engine)
        pools = await draw.draw(state, [ASK, (Message(PROMPT, "raw"),)], 3, SamplingSpec(8, seed=10))
        assert [[a.text for a in p.answers] for p in pools] == [
            ["w10 end", "w11 end", "w12 end"],
            [f"w{seed} end" for seed in Seeds(10, answer=1).stream(3)],
        ]
        assert pools[1].prompt.token_ids == tuple(map(ord, "raw"))
        assert pools[0].answers[0].token_ids == (0, 1)
        assert engine.running == set()

    async def test_the_engine_is_filled_but_not_flooded(self) -> None:
        engine = ScriptedEngine(step_s=0.002)
        await draw.draw(make_state(engine, max_num_seqs=8), [ASK] * 20, 4, SamplingSpec(8))
        assert engine.peak == 16

    async def test_a_prompt_without_room_is_named_before_anything_is_drawn(self) -> None:
        engine = ScriptedEngine(max_model_len=20)
        with pytest.raises(RequestError, match=r"prompt 2 of 2 has 16 tokens.* leaves 4 "):
            await draw.draw(make_state(engine), [ASK, (Message("user", "x" * 15),)], 2, SamplingSpec(8))
        assert engine.peak == 0

    async def test_scores_come_in_order_over_many_calls(self) -> None:
        state = make_state(ScriptedEngine(), {"hump": Hump()})
        (term,) = options.terms_of(state, [options.parse_reward('{"name": "hump", "top": 9}')])
        answers = tuple(Answer(f"w{i % 10}") for i in range(45))
        pools = [draw.AnswerPool(ASK, draw.tokens_of(state, ASK), part) for part in (answers, answers[:7])]
        values = await draw.score(state, pools, term)
        assert values == [tuple(float(i % 10 - 9) for i in range(n)) for n in (45, 7)]
        with pytest.raises(GuiderailError, match="top"):
            options.terms_of(state, [options.parse_reward('{"name": "hump", "top": "x"}')])
