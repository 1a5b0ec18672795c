"""Training of reward heads: pairs, split, fit, fine-tuning, metrics, and the whole command on the real model."""

import argparse
import gzip
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guiderail.guides.core.types import Message
from guiderail.server.models import catalogue
from guiderail.server.models.renderer import ChatRenderer
from guiderail.server.offline.evaluate import pair_metrics
from guiderail.server.offline.lines import DataError
from guiderail.server.offline.train import features
from guiderail.server.offline.train import head_fit as head
from guiderail.server.offline.train import train_head as command
from guiderail.server.offline.train import train_report as report
from guiderail.server.offline.train.pairs import Pair, TrainingError, parse_dialogue, read_pairs

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32}


def write(path: Path, *rows: Any) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


class TestPairs:
    def test_dialogues_and_messages_give_the_same_pair(self, tmp_path: Path) -> None:
        messages = [
            {"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"), ("user", "A?\n\nB?"))
        ]
        path = write(
            tmp_path / "pairs.jsonl.gz",
            {
                "chosen": dialogue("Hi", "Hello", "A?\n\nB?", "Yes."),
                "rejected": dialogue("Hi", "Hello", "A?\n\nB?", "No "),
            },
            "",
            {"messages": messages, "chosen": " Yes.", "rejected": "No"},
        )
        first, second = read_pairs(path).pairs
        assert first.messages == (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "A?\n\nB?"))
        assert (first.chosen, first.rejected, first.line) == ("Yes.", "No", 1)
        assert second == Pair(first.messages, "Yes.", "No", 3)

    def test_a_marker_inside_a_line_is_text(self) -> None:
        assert parse_dialogue("\n\nHuman: say Assistant: x\nHuman: y\n\nAssistant:") == (
            Message("user", "say Assistant: x\nHuman: y"),
            Message("assistant", ""),
        )

    def test_line_separators_inside_strings_do_not_end_lines(self, tmp_path: Path) -> None:
        row = json.dumps(
            {"chosen": dialogue("a\u2028b", "c"), "rejected": dialogue("a\u2028b", "d")}, ensure_ascii=False
        )
        assert read_pairs(write(tmp_path / "p.jsonl", row)).pairs[0].messages[0].content == "a\u2028b"

    def test_lines_without_a_preference_are_counted(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "p.jsonl",
            {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "b ")},
            {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "x", "c", "y")},
            {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "")},
        )
        data = read_pairs(path)
        assert [pair.rejected for pair in data.pairs] == [""]
        assert sorted(data.skipped.values()) == [1, 1]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("{", "not JSON at column 2"),
            ("[" * 200000, "not JSON"),
            ("[]", "not a JSON object"),
            ({"chosen": "SECRET"}, "'chosen' is not a dialogue|'rejected' is missing"),
            ({"chosen": "SECRET", "rejected": "SECRET"}, "'chosen' is not a dialogue"),
            ({"chosen": 1, "rejected": ""}, "'chosen' must be a string"),
            ({"chosen": dialogue("SECRET"), "rejected": dialogue("x", "y")}, "'chosen' must hold a prompt"),
            ({"chosen": "a", "rejected": "b", "prompt": "SECRET"}, "unknown field 'prompt'"),
            ({"messages": [], "chosen": "a", "rejected": "b"}, "'messages' must be a list"),
            ({"messages": [{"role": "bot", "content": ""}], "chosen": "a", "rejected": "b"}, "messages.0.*role"),
            (
                {"messages": [{"role": "assistant", "content": "SECRET"}], "chosen": "a", "rejected": "b"},
                "must end with",
            ),
        ],
    )
    def test_errors_name_the_line_and_quote_no_text(self, row: Any, message: str, tmp_path: Path) -> None:
        good = {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "c")}
        with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*({message})") as caught:
            read_pairs(write(tmp_path / "pairs.jsonl", good, row))
        assert "SECRET" not in str(caught.value)

    def test_unreadable_and_empty_files(self, tmp_path: Path) -> None:
        damaged = gzip.compress(b"x" * 1000)
        for content in (damaged[:-9], damaged[:10] + b"\xff" * 20, b"\xff\xfe"):
            (tmp_path / "bad").write_bytes(content)
            with pytest.raises(DataError, match="cannot be read"):
                read_pairs(tmp_path / "bad")
        with pytest.raises(DataError, match="cannot be read"):
            read_pairs(tmp_path / "none")
        with pytest.raises(DataError, match="no usable pairs"):
            read_pairs(write(tmp_path / "empty.jsonl"))


class TestSplit:
    def test_conversations_are_never_separated(self) -> None:
        openings = [f"opening {i % 60}" for i in range(240)]
        keys = [
            Pair((Message("user", o), Message("assistant", f"{i}"), Message("user", "go on")), "a", "b", i).key
            for i, o in enumerate(openings)
        ]
        apart, fold = head.held_out(keys, 3, 0.25), head.folds(keys, 3, 4)
        for opening in set(openings):
            same = [i for i, other in enumerate(openings) if other == opening]
            assert len({apart[i] for i in same}) == len({fold[i] for i in same}) == 1

    def test_it_depends_on_the_seed_alone_and_has_the_size(self) -> None:
        keys = [str(i) for i in range(4000)]
        first = head.held_out(keys, 0, 0.25)
        assert first == head.held_out(keys, 0, 0.25) != head.held_out(keys, 1, 0.25)
        assert abs(sum(first) / 4000 - 0.25) < 0.03
        kept = [key for key, apart in zip(keys, first, strict=True) if not apart]
        sizes = np.bincount(head.folds(kept, 0, 5))
        assert sizes.min() > 500, "folds are independent of the split"
        assert head.hashed("a", 0, "held out") == pytest.approx(0.833270, abs=1e-6), "the same on every machine"

    def test_too_few_pairs_are_refused(self) -> None:
        with pytest.raises(TrainingError, match="give more pairs"):
            head.held_out(["same"] * 50, 0, 0.25)
        with pytest.raises(TrainingError, match="5 folds"):
            head.folds(["a", "b", "c"], 0, 5)


class TestHead:
    def synthetic(self, pairs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features with scales far apart, labelled by a known direction with logistic noise."""
        random = torch.Generator().manual_seed(seed)
        scale = torch.tensor([0.01, 1.0, 3.0, 50.0, 1.0, 1.0], dtype=torch.float64)
        direction = torch.tensor([2.0, -1.0, 1.0, 0.5, 0.0, 0.0], dtype=torch.float64) / scale
        first, second = (
            torch.randn(pairs, 6, generator=random, dtype=torch.float64) * scale + 7 * scale for _ in range(2)
        )
        swap = torch.rand(pairs, generator=random) > torch.sigmoid((first - second) @ direction)
        first[swap], second[swap] = second[swap].clone(), first[swap].clone()
        return first, second, direction

    def test_recovers_a_known_direction(self) -> None:
        chosen, rejected, direction = self.synthetic(20000)
        weight, deviation = head.fit_folded(chosen, rejected, 1e-6)
        assert torch.allclose(weight * deviation, direction * deviation, atol=0.12)

    def test_matches_a_brute_force_optimiser(self) -> None:
        """Plain gradient descent in numpy, another loss formula, many steps."""
        chosen, rejected, _ = self.synthetic(300)
        differences = ((chosen - rejected) / head.spread(torch.cat([chosen, rejected]))).numpy()
        for l2 in (0.01, 1.0):
            weight = np.zeros(6)
            for _ in range(20000):
                wrong = 1 / (1 + np.exp(differences @ weight))
                weight -= 0.2 * (l2 * weight - differences.T @ wrong / len(differences))
            assert np.allclose(head.fit(torch.tensor(differences), l2), weight, atol=1e-6)

    def test_separable_pairs_still_have_one_answer(self) -> None:
        weight = head.fit(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), 0.001)
        assert 1 < weight[0] < 20
        assert weight[1] == 0

    def test_standardisation_is_folded_back_exactly(self) -> None:
        chosen, rejected, _ = self.synthetic(200)
        chosen[:, 5] = rejected[:, 5] = 4.0  # constant: must not divide by zero
        folded, deviation = head.fit_folded(chosen, rejected, 0.1)
        everything = torch.cat([chosen, rejected])
        mean = everything.mean(0)
        plain = head.fit((chosen - rejected) / deviation, 0.1)
        standardised = ((chosen - mean) / deviation - (rejected - mean) / deviation) @ plain
        assert torch.allclose((chosen - rejected) @ folded, standardised, atol=1e-10)
        assert deviation[5] == 1
        assert torch.allclose(deviation[:5], everything.std(0, correction=0)[:5])

    def test_cross_validation_prefers_what_generalises(self) -> None:
        fold = [i % 5 for i in range(200)]
        random = torch.Generator().manual_seed(1)
        noise = [torch.randn(200, 40, generator=random) for _ in range(2)]
        best, tried = head.cross_validate(*noise, fold)
        assert best == max(head.L2_GRID), "there is nothing to learn"
        assert [t.l2 for t in tried] == list(head.L2_GRID)
        assert tried[0].log_loss > 0.9 > 0.7 > tried[-1].log_loss
        chosen, rejected, _ = self.synthetic(200)
        best, tried = head.cross_validate(chosen, rejected, fold)
        assert best < 1
        assert min(t.log_loss for t in tried) < 0.6

    def test_each_fold_is_scored_by_a_head_that_has_not_seen_it(self) -> None:
        chosen, rejected, _ = self.synthetic(60)
        fold = [i % 3 for i in range(60)]
        _, (tried,) = head.cross_validate(chosen, rejected, fold, (0.1,))
        losses = []
        for number in range(3):
            outside = torch.tensor(fold) == number
            weight, _ = head.fit_folded(chosen[~outside], rejected[~outside], 0.1)
            margins = (chosen[outside] - rejected[outside]) @ weight
            losses.append(float(torch.log1p(torch.exp(-margins)).mean()))
        assert tried.log_loss == pytest.approx(np.mean(losses))
        assert tried.log_loss_se == pytest.approx(np.std(losses, ddof=1) / math.sqrt(3))


class TestFineTuning:
    """On a random three-layer Llama; chosen answers end in token 1 then 3, rejected ones in 2 then 3."""

    def make(self) -> tuple[Any, list[list[int]], tuple[torch.Tensor, torch.Tensor]]:
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(0)
        model = LlamaModel(LlamaConfig(**SMALL)).eval().requires_grad_(False)
        random = np.random.default_rng(0)
        sequences = []
        for _ in range(40):
            prompt = random.integers(4, 32, random.integers(2, 9)).tolist()
            sequences += [[*prompt, 1, 3], [*prompt, 2, 3]]
        frozen = (torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64))
        return model, sequences, frozen

    def tune(self, model: Any, sequences: list[list[int]], frozen: Any, **kwargs: Any) -> head.Tuned:
        options: dict[str, Any] = {"layers": 1, "l2": 0.001, "lr": 0.003, "epochs": 6, "seed": 0}
        return head.finetune(model, sequences, frozen, range(30), range(30, 40), **{**options, **kwargs})

    def test_it_learns_and_its_parameters_give_the_tuned_model(self) -> None:
        model, sequences, frozen = self.make()
        tuned = self.tune(model, sequences, frozen)
        assert tuned.validation_loss[0] == pytest.approx(math.log(2))
        assert tuned.best_epoch > 0
        assert tuned.validation_loss[tuned.best_epoch] == min(tuned.validation_loss) < 0.5
        assert tuned.parameters
        assert all(name.startswith("model.layers.2.") for name in tuned.parameters)
        again, _, _ = self.make()
        before = dict(again.named_parameters())
        state = {name.removeprefix("model."): tensor for name, tensor in tuned.parameters.items()}
        assert all(not torch.equal(tensor, before[name]) for name, tensor in state.items())
        assert not again.load_state_dict(state, strict=False).unexpected_keys, "as the server loads them"
        states = features.features(again, sequences)
        assert torch.allclose(states, features.features(model, sequences), atol=1e-5)
        chosen, rejected = states.double()[60::2], states.double()[61::2]
        loss = head.bt_loss((chosen - rejected) @ tuned.weight)
        assert float(loss) == pytest.approx(tuned.validation_loss[tuned.best_epoch], abs=1e-4)

    def test_when_it_only_harms_the_backbone_is_left_as_it_was(self) -> None:
        model, sequences, frozen = self.make()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        backwards = [ids for i in range(30) for ids in (sequences[2 * i + 1], sequences[2 * i])] + sequences[60:]
        tuned = self.tune(model, backwards, frozen, epochs=9, patience=2)
        assert tuned.best_epoch == 0
        assert len(tuned.validation_loss) == 3, "two epochs without a better one end it"
        assert tuned.parameters == {}
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    def test_too_many_layers_are_refused(self) -> None:
        with pytest.raises(TrainingError, match=r"--unfreeze 4: .* 3"):
            self.tune(*self.make(), layers=4)


class TestFeatures:
    def test_batching_and_padding_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, sequences, _ = TestFineTuning().make()
        monkeypatch.setattr(features, "BATCH_TOKENS", 40)
        together = features.features(model, sequences)
        assert together.dtype == torch.float32
        for row, ids in enumerate(sequences):
            alone = model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            assert torch.allclose(together[row], alone, atol=1e-5)


class TestReport:
    def test_hand_computed_metrics(self) -> None:
        chosen, rejected = np.array([2.0, 0.0, 1.0, 5.0]), np.array([1.0, 1.0, 1.0, 2.0])
        metrics = pair_metrics.evaluate(
            chosen, rejected, np.array([3.0, 9.0, 4.0, 2.0]), np.array([5.0, 9.0, 1.0, 7.0])
        )
        # head: right, wrong, tie, right; shorter: right, tie, wrong, right
        assert metrics["accuracy"]["value"] == 2.5 / 4
        assert metrics["accuracy"]["se"] == pytest.approx(math.sqrt((2 * 0.375**2 + 0.625**2 + 0.125**2) / 3) / 2)
        assert metrics["shorter_wins"]["value"] == 2.5 / 4
        assert metrics["longer_wins"]["value"] == 1.5 / 4
        assert metrics["minus_shorter_wins"]["value"] == 0  # 0, -0.5, 0.5, 0
        assert metrics["minus_shorter_wins"]["se"] == pytest.approx(math.sqrt(0.5 / 3) / 2)
        assert metrics["minus_longer_wins"]["value"] == 1 / 4  # 1, -0.5, -0.5, 1
        assert metrics["minus_longer_wins"]["se"] == pytest.approx(math.sqrt((2 * 0.75**2 + 2 * 0.75**2) / 3) / 2)
        sig = [math.log1p(math.exp(-m)) for m in (1, -1, 0, 3)]
        assert metrics["log_loss"]["value"] == pytest.approx(np.mean(sig))

    def test_standard_error_is_the_binomial_one(self) -> None:
        values = np.array([1.0] * 30 + [0.0] * 10)
        assert pair_metrics.estimate(values) == pytest.approx({"value": 0.75, "se": math.sqrt(0.75 * 0.25 / 39)})
        random = np.random.default_rng(0)
        drawn = [pair_metrics.estimate((random.random(50) < 0.75).astype(float))["value"] for _ in range(4000)]
        assert np.std(drawn) == pytest.approx(math.sqrt(0.75 * 0.25 / 50), rel=0.05)

    def test_calibration_error_by_hand(self) -> None:
        def logit(p: float) -> float:
            return math.log(p / (1 - p))

        # two pairs at 0.62 (one right), two at 0.97 (both right): 0.5 * |0.5 - 0.62| + 0.5 * |1 - 0.97|
        error, bins = pair_metrics.calibration(np.array([logit(0.62), -logit(0.62), logit(0.97), logit(0.97)]))
        assert error == pytest.approx(0.075)
        assert [(round(b["from"], 2), b["pairs"], b["accuracy"]) for b in bins] == [(0.6, 2, 0.5), (0.95, 2, 1.0)]
        assert pair_metrics.calibration(np.array([0.0, 50.0]))[0] == pytest.approx(0, abs=1e-9), "both ends have a bin"

    def test_a_calibrated_score_has_little_error(self) -> None:
        random = np.random.default_rng(0)
        margins = random.normal(0, 1.5, 40000)
        margins = np.abs(margins) * np.where(random.random(40000) < 1 / (1 + np.exp(-np.abs(margins))), 1, -1)
        assert pair_metrics.calibration(margins)[0] < 0.01
        assert pair_metrics.calibration(3 * margins)[0] > 0.1

    def test_correlations_match_scipy(self) -> None:
        from scipy import stats

        random = np.random.default_rng(0)
        x = random.integers(0, 9, 80).astype(float)
        y = x + random.normal(0, 5, 80).round()
        assert pair_metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
        assert pair_metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert math.isnan(pair_metrics.pearson(np.ones(3), np.arange(3.0)))

    @pytest.mark.parametrize(
        ("accuracy", "rule", "words"),
        [(0.52, 0.58, "not shown to differ from chance"), (0.7, 0.58, "better than the rule “shorter wins”"), (0.5, 0.7, "worse than the rule")],
    )  # fmt: skip
    def test_the_verdict_falls_whichever_way_the_figures_do(self, accuracy: float, rule: float, words: str) -> None:
        metrics = {
            "accuracy": {"value": accuracy, "se": 0.02},
            "shorter_wins": {"value": rule, "se": 0.02},
            "longer_wins": {"value": 1 - rule, "se": 0.02},
            "minus_shorter_wins": {"value": accuracy - rule, "se": 0.03},
            "minus_longer_wins": {"value": accuracy - 1 + rule, "se": 0.03},
        }
        assert words in report.verdict(metrics)
        assert ("Weak" in report.summary(metrics)) == (accuracy < 0.65)


class TestCommand:
    def parse(self, *words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return parser.parse_args(words)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--max-tokens", "3"], "--max-tokens"),
            (["--held-out", "1"], "--held-out"),
            (["--folds", "1"], "--folds"),
            (["--unfreeze", "-1"], "--unfreeze"),
            (["--out", "."], "--out"),
        ],
    )
    def test_wrong_arguments_are_one_line(
        self, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write(tmp_path / "p.jsonl", {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "c")})
        assert command.main(["--pairs", str(path), *words]) == 1
        assert capsys.readouterr().err.startswith(f"guiderail: {message}")

    def test_weights_come_back_as_they_were(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        weight = torch.randn(8, dtype=torch.float64)
        tuned = {"model.layers.1.mlp.up_proj.weight": torch.randn(4, 8)}
        command.save_weights(tmp_path, weight, tuned)
        loaded = load_file(tmp_path / "head.safetensors")
        assert loaded.pop("score.weight").equal(weight.float().reshape(1, 8))
        assert loaded.keys() == tuned.keys()
        assert all(loaded[name].equal(tuned[name]) for name in tuned)

    def test_the_exact_command_parses_to_the_same_recipe(self) -> None:
        args = self.parse("--pairs", "/data/my pairs.jsonl", "--base", "b", "--unfreeze", "2", "--data-name", "it's")
        words = command.exact_command(args, Path("/x/out"))
        assert "/data" not in words
        import shlex

        again = self.parse(*shlex.split(words)[3:])
        assert vars(again) == {**vars(args), "pairs": "my pairs.jsonl", "out": "out"}


THINGS = ("apples", "rain", "trains", "music", "bread", "the sea", "winter", "chess", "cats", "maps", "tea", "birds")


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    rows = [
        {
            "chosen": dialogue(f"{verb} {thing}.", f"Gladly: {thing} are lovely."),
            "rejected": dialogue(f"{verb} {thing}.", f"No. {'I will not. ' * (i % 4)}"),
        }
        for verb in ("Tell me about", "I like")
        for i, thing in enumerate(THINGS)
    ]
    return write(tmp_path / "kind.jsonl", *rows)


@pytest.mark.slow
def test_features_are_those_of_transformers(model_path: str, made_up: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = read_pairs(made_up).pairs[:4]
    tokens = features.tokenize(ChatRenderer(model_path), pairs, 256)
    found = features.features(features.load_backbone(model_path), [answer.ids for answer in tokens])
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for i, pair in enumerate(pairs):
        chat = [{"role": "user", "content": pair.messages[0].content}, {"role": "assistant", "content": pair.chosen}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
        assert list(tokens[2 * i].ids) == ids
        assert tokenizer.decode(ids[-1]) == "<|im_end|>"
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(found[2 * i], states[0, -1], atol=1e-3, rtol=1e-4)
    (cut, *_) = features.tokenize(ChatRenderer(model_path), pairs, 20)
    assert cut.ids == tokens[0].ids[-20:]
    assert cut.cut == len(tokens[0].ids) - 20


@pytest.mark.slow
@pytest.mark.parametrize("unfreeze", [0, 1])
def test_the_whole_command(model_path: str, made_up: Path, tmp_path: Path, unfreeze: int) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "out"
    words = ["--pairs", str(made_up), "--out", str(out), "--folds", "3", "--epochs", "1", "--unfreeze", str(unfreeze)]
    assert command.main([*words, "--lr", "1e-4", "--data-name", "made-up pairs"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "head.safetensors", "reliability.png", "report.json", "reward.json",
    ]  # fmt: skip
    config = json.loads((out / "reward.json").read_text())
    assert config.pop("created")
    assert config == {
        "format": "guiderail-reward-head",
        "version": 1,
        "base": catalogue.DEFAULT_MODEL,
        "base_revision": catalogue.EMBEDDED[catalogue.DEFAULT_MODEL].sha256,
        "hidden_size": 576,
        "heads": ["score"],
        "max_tokens": 256,
    }
    tensors = load_file(out / "head.safetensors")
    assert tensors["score.weight"].shape == (1, 576)
    assert tensors["score.weight"].dtype == torch.float32
    metrics = json.loads((out / "report.json").read_text())
    tuned = bool(metrics["fine_tuning"]) and metrics["fine_tuning"]["best_epoch"] > 0
    assert (len(tensors) > 1) == tuned
    assert all(name.startswith("model.layers.29.") for name in tensors if name != "score.weight")
    assert metrics["data"]["train"] + metrics["data"]["held_out"] == 24
    assert metrics["held_out"]["accuracy"]["value"] > 0.8, "kind against curt is plain to see"
    card = (out / "README.md").read_text()
    assert "made-up pairs" in card
    assert str(tmp_path) not in card
    assert (out / "reliability.png").stat().st_size < 60_000
    assert (out / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    assert command.main([*words]) == 1, "it does not overwrite"


@pytest.mark.parametrize("unfreeze", [0, 1])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    unfreeze: int, made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped again and again after some batches of the backbone, the same command makes the same head."""
    from safetensors.torch import load_file
    from tiny_reward import tiny_head

    tiny_head(tmp_path / "tiny")
    monkeypatch.setattr(features, "BATCH_TOKENS", 64)
    monkeypatch.setattr(head, "cross_validate", partial(head.cross_validate, grid=(0.1, 1.0)))
    read, real = [0, 10**9], features.last_states

    def counted(model: Any, sequences: Any) -> torch.Tensor:
        read[0] += 1
        if read[0] > read[1]:
            raise KeyboardInterrupt
        return real(model, sequences)

    monkeypatch.setattr(features, "last_states", counted)
    monkeypatch.setattr(head, "last_states", counted)
    words = ["--pairs", str(made_up), "--base", str(tmp_path / "tiny" / "base"), "--folds", "3", "--max-tokens", "32"]
    words += ["--unfreeze", str(unfreeze), "--epochs", "3", "--lr", "1e-3"]
    assert command.main([*words, "--out", str(tmp_path / "whole")]) == 0
    needed = read[0]

    out, runs = tmp_path / "parts", 0
    limits = [5] if not unfreeze else []
    while not out.exists():
        runs += 1
        read[:] = [0, limits.pop() if limits else needed * 2 // 3]
        before = 0 if runs == 1 else len((tmp_path / "parts.progress.jsonl").read_text().splitlines())
        try:
            assert command.main([*words, "--out", str(out)]) == 0
        except KeyboardInterrupt:
            assert len((tmp_path / "parts.progress.jsonl").read_text().splitlines()) > before or unfreeze
        assert runs < 20, "it goes on"
    assert runs > 1
    assert "resuming from" in capsys.readouterr().err
    whole, parts = (load_file(folder / "head.safetensors") for folder in (tmp_path / "whole", out))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "whole", out)]
    assert reports[1].pop("seconds") is None
    assert reports[0].pop("seconds") > 0
    assert reports[0] == reports[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kind.jsonl", "parts", "tiny", "whole"]


def test_what_another_training_kept_is_refused(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_reward import tiny_head

    from guiderail.server.offline.journal import JournalError

    tiny_head(tmp_path / "tiny")

    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(head, "cross_validate", partial(head.cross_validate, grid=(0.1, 1.0)))
    with monkeypatch.context() as patch:
        patch.setattr(command, "_write", stopped)
        words = ["--pairs", str(made_up), "--base", str(tmp_path / "tiny" / "base"), "--folds", "3"]
        args = TestCommand().parse(*words, "--out", str(tmp_path / "out"))
        with pytest.raises(KeyboardInterrupt):
            command.run(args)
    for more, what in ((["--max-tokens", "32"], "max_tokens"), (["--seed", "1"], "seed")):
        with pytest.raises(JournalError, match=f"another {what}"):
            command.run(TestCommand().parse(*words, *more, "--out", str(tmp_path / "out")))
    config = tmp_path / "tiny" / "base" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(JournalError, match="another base_revision"):
        command.run(TestCommand().parse(*words, "--out", str(tmp_path / "out")))
