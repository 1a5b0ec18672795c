"""Embedded models: conversion happens once, atomically; a damaged source or cache is noticed."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from guiderail.server.models import catalogue
from guiderail.server.models.catalogue import EmbeddedModel, ModelError


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"weights")

    def convert(gguf: Path, target: Path, *, add_bos: bool) -> None:
        calls.append(gguf.name)
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(gguf.read_bytes() * 2)

    monkeypatch.setattr(catalogue, "convert_gguf", convert)
    return EmbeddedModel("tiny", "A model.", "none", hashlib.sha256(b"weights").hexdigest(), lambda scratch: source)


calls: list[str] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def test_it_is_converted_once(model: EmbeddedModel, tmp_path: Path) -> None:
    first = catalogue.prepare(model, tmp_path / "cache")
    assert catalogue.prepare(model, tmp_path / "cache") == first
    assert calls == ["tiny.gguf"]
    assert (first / "model.safetensors").read_bytes() == b"weightsweights"


@pytest.mark.parametrize("damage", ["change", "remove", "manifest"])
def test_a_broken_copy_is_made_anew(damage: str, model: EmbeddedModel, tmp_path: Path) -> None:
    folder = catalogue.prepare(model, tmp_path / "cache")
    match damage:
        case "change":
            (folder / "model.safetensors").write_bytes(b"weightsweighty")
        case "remove":
            (folder / "config.json").unlink()
        case "manifest":
            (folder / catalogue.MANIFEST).write_text("{")
    said: list[str] = []
    assert catalogue.prepare(model, tmp_path / "cache", said.append) == folder
    assert "broken" in said[0]
    assert len(calls) == 2
    assert catalogue.check(folder) is None


def test_a_damaged_source_is_refused_and_leaves_nothing(model: EmbeddedModel, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"weighty")
    with pytest.raises(ModelError, match="damaged"):
        catalogue.prepare(model, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()] == []


def test_a_conversion_that_fails_leaves_nothing(
    model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(catalogue, "convert_gguf", fail)
    with pytest.raises(OSError, match="disk full"):
        catalogue.prepare(model, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()] == []


def test_resolve(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert catalogue.resolve(str(tmp_path), tmp_path) == str(tmp_path)
    assert catalogue.resolve("owner/name", tmp_path) == "owner/name"
    with pytest.raises(ModelError, match=r"config\.json"):
        (tmp_path / "empty").mkdir()
        catalogue.resolve(str(tmp_path / "empty"), tmp_path)
    for name in ("nope", "./nope/x", "a/b/c"):
        with pytest.raises(ModelError, match="smollm2-135m-instruct, gemma3-270m"):
            catalogue.resolve(name, tmp_path)


def test_the_real_default_model_is_sound(model_path: str) -> None:
    folder = Path(model_path)
    assert catalogue.check(folder) is None
    assert not (folder / "tokenizer.model").exists()


@pytest.mark.slow
def test_gemma_gets_exactly_one_bos_and_its_notice() -> None:
    from guiderail.server.models.renderer import ChatRenderer
    from guiderail.server.settings import Settings

    said: list[str] = []
    folder = catalogue.resolve("gemma3-270m", Settings().cache, said.append)
    assert "Terms of Use" in said[0]
    renderer = ChatRenderer(folder)
    bos = renderer.encode("<bos>")[0]
    assert renderer.encode("Hello there", add_special_tokens=True).count(bos) == 1
    assert renderer.encode("Hello there", add_special_tokens=True)[0] == bos
    assert not renderer.has_chat_template
