"""Settings: precedence of flag, environment and file, and errors that name the line."""

from pathlib import Path

import pytest

from guiderail.server.cli import _parser, main
from guiderail.server.serve_flags import given
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
    assert load(given(_parser().parse_args(["serve", "--batch-invariant"])), None).batch_invariant
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


SERVE_FLAGS = """
--config --model --served-model-name --host --port --api-key --api-key-file --chat-template --dtype
--max-model-len --kv-cache-gb --allow-control-tokens --plain-completions
--gpu-memory-utilization --max-num-seqs --max-num-batched-tokens --tensor-parallel-size --compile --enforce-eager
--batch-invariant --lora --max-lora-rank --policy --guides --rewards --reward --calibration --encoder --urial
--cache-dir --debug --drain-timeout-s --allowed-origin --header-timeout-s --body-timeout-s --idle-timeout-s --write-timeout-s
--max-connections --strict-fields
"""
OFFLINE_FLAGS = """
--config --model --chat-template --dtype --max-model-len --kv-cache-gb --gpu-memory-utilization --max-num-seqs
--tensor-parallel-size --compile --cache-dir
"""


def flags_in(help: str) -> set[str]:
    return {word for line in help.splitlines() if line.startswith("  --") for word in line.split() if word[:2] == "--"}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["serve"], SERVE_FLAGS),
        (["models"], "--cache-dir"),
        (
            ["rewards", "calibrate"],
            f"{OFFLINE_FLAGS} --prompts --reward --max-tokens --temperature --top-p --seed --out",
        ),
    ],
)
def test_the_flags_of_a_command(command: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    help = capsys.readouterr().out
    assert flags_in(help) == set(expected.split())


def test_every_flag_reaches_its_setting(tmp_path: Path) -> None:
    said = {
        "model": ("m", "m"), "served_model_name": ("n", "n"), "host": ("::1", "::1"), "port": ("1", 1),
        "api_key": (["a", "b"], ["a", "b"]), "chat_template": ("t", "t"), "dtype": ("float32", "float32"),
        "max_model_len": ("99", 99), "kv_cache_gb": ("1.5", 1.5), "gpu_memory_utilization": ("0.5", 0.5),
        "max_num_seqs": ("3", 3), "max_num_batched_tokens": ("100", 100), "tensor_parallel_size": ("2", 2),
        "compile": (None, True), "batch_invariant": (None, True), "max_lora_rank": ("8", 8),
        "lora": (["a=/x", "b=/y=z"], {"a": "/x", "b": "/y=z"}), "urial": (["s=f.md"], {"s": "f.md"}),
        "guides": ("sampling,args", ["sampling", "args"]), "rewards": ("length", ["length"]),
        "calibration": (["f", "g"], [Path("f"), Path("g")]), "encoder": ("e", "e"),
        "cache_dir": (str(tmp_path), tmp_path), "debug": (None, True), "drain_timeout_s": ("2.5", 2.5),
        "header_timeout_s": ("1", 1), "body_timeout_s": ("2", 2), "idle_timeout_s": ("3", 3), "write_timeout_s": ("4", 4),
        "max_connections": ("5", 5), "allowed_origin": (["https://a.b", "*"], ["https://a.b", "*"]),
    }  # fmt: skip
    words = ["serve"]
    for name, (text, _) in said.items():
        for item in text if isinstance(text, list) else [text]:
            words += [f"--{name.replace('_', '-')}"] + ([item] if item is not None else [])
    words += ["--reward", "r=p,head=1", "--policy", "q=http://h:1,model=m"]
    found = load(given(_parser().parse_args(words)), None)
    for name, (_, value) in said.items():
        assert getattr(found, name) == value, name
    assert (found.reward["r"].path, found.reward["r"].head) == ("p", 1)
    assert (found.policy["q"].url, found.policy["q"].model) == ("http://h:1", "m")


@pytest.mark.parametrize("flag", ["--lora", "--urial", "--reward", "--policy"])
def test_a_name_given_twice_is_refused_and_no_flag_is_dropped(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", flag, "mine=http://h:1", flag, "other=http://h:2", flag, "mine=http://h:3"]) == 1
    assert capsys.readouterr().err == f"guiderail: {flag} mine: this name is given twice\n"


@pytest.mark.parametrize("flag", ["--lora", "--urial"])
def test_a_pair_without_a_path_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", flag, "name"]) == 1
    assert capsys.readouterr().err.startswith(f"guiderail: {flag} takes NAME=")
