"""A language model without a trained head is no reward model: refused by name, at the start and wherever it is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_reward import tiny_head, tiny_policy

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.cli import main
from guiderail.server.models import catalogue
from guiderail.server.rewards.models.loading import (
    check_source,
    classifier_folder,
    load_model,
    write_classifier,
)
from guiderail.server.rewards.models.reward_spec import RewardModelSpec
from guiderail.server.rewards.models.trained_head import require_head


def spec(path: str, **options: Any) -> RewardModelSpec:
    return RewardModelSpec(path=path, **options)


@pytest.fixture
def language_model(tmp_path: Path) -> str:
    return tiny_policy(tmp_path, "lm")


@pytest.mark.parametrize("backend", ["packed", "vllm"])
def test_a_language_model_is_refused_by_name_before_the_start(language_model: str, backend: str) -> None:
    for path in (language_model, catalogue.DEFAULT_MODEL):
        with pytest.raises(GuiderailError, match="without a trained head") as failure:
            check_source("rm", spec(path, backend=backend))
        assert f"--reward rm: {path}" in str(failure.value)


def test_a_language_model_is_refused_where_it_is_loaded(language_model: str, tmp_path: Path) -> None:
    """As one of the Hub is, whose weights are not there before."""
    for load in (load_model, classifier_folder):
        with pytest.raises(GuiderailError, match=r"without a trained head \(no weight 'score.weight'\)"):
            load(language_model, tmp_path)


def test_classifiers_heads_and_pairs_of_language_models_are_not_refused(language_model: str, tmp_path: Path) -> None:
    head = tiny_head(tmp_path)
    base = Path(json.loads((Path(head) / "reward.json").read_text())["base"])
    write_classifier(load_model(head, tmp_path), base, tmp_path / "classifier")
    check_source("rm", spec(head))
    check_source("rm", spec(str(tmp_path / "classifier")))
    check_source("rm", spec(language_model, reference=catalogue.DEFAULT_MODEL))
    check_source("rm", spec(language_model, backend="vllm", url="http://127.0.0.1:1"))  # the tokenizer alone
    assert len(load_model(str(tmp_path / "classifier"), tmp_path).heads) == 2


def test_the_index_of_a_checkpoint_in_parts_says_what_is_in_them(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for names, fine in (
        (["model.norm.weight", "score.weight"], True),
        (["model.score.weight"], True),
        (["lm_head.weight"], False),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "a")}))
        if fine:
            require_head("rm", str(folder))
        else:
            with pytest.raises(GuiderailError, match="reward model rm: a language model"):
                require_head("rm", str(folder))
    shutil.rmtree(folder)


def test_the_command_refuses_it_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "p.jsonl"
    turn = {"role": "user", "content": "Hi"}
    pairs.write_text(json.dumps({"messages": [turn], "chosen": "Hello!", "rejected": "Go away."}) + "\n")
    out = tmp_path / "out"
    command = ["rewards", "evaluate", "--pairs", str(pairs), "--reward", f"rm={catalogue.DEFAULT_MODEL}"]
    assert main([*command, "--out", str(out)]) != 0
    assert "rm: smollm2-135m-instruct: a language model without a trained head" in capsys.readouterr().err
    assert not out.exists()
