"""Settings: precedence of flag, environment and file, and errors that name the line."""

from pathlib import Path

import pytest

from guiderail.server.cli import _flags, _parser, main
from guiderail.server.settings import SettingsError, load


def test_flag_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("port: 1\nhost: 127.0.0.2\nmax_num_seqs: 7\nlimits: {max_n: 3}\n")
    monkeypatch.setenv("GUIDERAIL_PORT", "2")
    monkeypatch.setenv("GUIDERAIL_HOST", "127.0.0.3")
    found = load({"port": 3}, str(config))
    assert (found.port, found.host, found.max_num_seqs, found.limits.max_n) == (3, "127.0.0.3", 7, 3)


def test_batch_invariance_is_a_flag_a_variable_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("batch_invariant: true\n")
    assert not load({}, None).batch_invariant
    assert load({}, str(config)).batch_invariant
    assert load(_flags(_parser().parse_args(["serve", "--batch-invariant"])), None).batch_invariant
    monkeypatch.setenv("GUIDERAIL_BATCH_INVARIANT", "1")
    assert load({}, None).batch_invariant


def test_keys_from_the_environment_are_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDERAIL_API_KEY", "one,two")
    assert load({}, None).api_key == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "prot"),
        ("port: 99999", "port"),
        ("limits: {max_x: 1}", r"limits\.max_x"),
        ("- 1", "mapping"),
        ("a: [", "flow"),
    ],
)
def test_a_bad_file_names_the_line(text: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load({}, str(config))


def test_a_bad_command_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", "/nowhere.yaml"]) == 1
    assert capsys.readouterr().err.startswith("guiderail: --config /nowhere.yaml")
    assert main(["serve", "--lora", "x"]) == 1
    assert "NAME=PATH" in capsys.readouterr().err
    assert main(["serve", "--compile", "--enforce-eager", "--max-num-batched-tokens", "4096"]) == 1
    assert "compile and enforce_eager exclude each other" in capsys.readouterr().err
    assert main(["models", "nope"]) == 1
    assert "smollm2-135m-instruct" in capsys.readouterr().err


def test_listings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "smollm2-135m-instruct (default)" in capsys.readouterr().out
    assert main(["guides"]) == 0
    assert "n = 16" in capsys.readouterr().out
    assert main(["rewards"]) == 0
    assert "VADER" in capsys.readouterr().out
