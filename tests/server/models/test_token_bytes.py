"""The bound on a token's bytes: never less than what a token stands for, and none where there can be none."""

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from guiderail.guides.core.errors import TooLong
from guiderail.guides.core.types import Message
from guiderail.server.models.renderer import ChatRenderer
from guiderail.server.models.token_bytes import TokenBytes, token_bytes


@cache
def tokenizer_of(folder: str) -> Tokenizer:
    return Tokenizer.from_file(f"{folder}/tokenizer.json")


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(*more: str) -> Tokenizer:
    vocabulary = {text: number for number, text in enumerate([*BYTES, *more])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def by_characters(**more: Any) -> Tokenizer:
    vocabulary = {
        text: number for number, text in enumerate(["<unk>", "a", "b", "▁", *(f"<0x{i:02X}>" for i in range(256))])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", **more))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def with_parts(tokenizer: Tokenizer, normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def with_added(tokenizer: Tokenizer, token: AddedToken) -> Tokenizer:
    tokenizer.add_tokens([token])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "bound"),
    [
        (byte_level(), 1),
        (byte_level("abcdefg"), 7),
        (with_added(byte_level(), AddedToken("<|end|>")), 7),
        (with_parts(byte_level("abc"), normalizers.NFC()), 9),
        (by_characters(byte_fallback=True, fuse_unk=True), 6),
        (by_characters(fuse_unk=False), 6),
        (by_characters(fuse_unk=True), None),
        (with_parts(byte_level(), normalizers.NFKC()), None),
        (with_parts(byte_level(), normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])), None),
        (with_parts(byte_level(), normalizers.Replace("aa", "b")), None),
        (with_parts(by_characters(fuse_unk=False), None, pre_tokenizers.Whitespace()), None),
        (with_parts(by_characters(fuse_unk=False), None, pre_tokenizers.Split(" ", "removed")), None),
        (with_parts(by_characters(fuse_unk=False), None, pre_tokenizers.Split(" ", "merged_with_previous")), 6),
        (with_added(byte_level(), AddedToken("<m>", lstrip=True)), None),
        (Tokenizer(models.WordLevel({"a": 0, "u": 1}, unk_token="u")), None),
    ],
)
def test_the_bound_is_told_from_the_description(tokenizer: Tokenizer, bound: int | None) -> None:
    assert token_bytes(tokenizer.to_str()) == (None if bound is None else TokenBytes(bound))


def test_bytes_that_an_alphabet_lacks_are_not_counted() -> None:
    vocabulary = {text: number for number, text in enumerate(set(BYTES) - set("xy"))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bound = token_bytes(tokenizer.to_str())
    assert bound == TokenBytes(1, b"xy")
    assert (bound.least("xyxyx"), bound.least("axbyc"), bound.least("")) == (0, 3, 0)
    assert len(tokenizer.encode("axbyc").ids) == 3


@given(
    st.text(
        alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab \u0301\u1100\u1161\u11a8"))
    )
)
def test_no_token_stands_for_more_bytes(text: str) -> None:
    for tokenizer in (byte_level("ab"), with_parts(byte_level(), normalizers.NFC()), by_characters(byte_fallback=True)):
        bound = token_bytes(tokenizer.to_str())
        assert bound is not None
        assert bound.least(text) <= len(tokenizer.encode(text).ids)


def test_a_text_that_is_too_long_is_refused_before_it_is_encoded(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = ChatRenderer(model_path, context=lambda: 100)
    text = "All work and no play. " * 100_000
    monkeypatch.setattr("guiderail.server.models.control_tokens.ControlTokens.encode", None)
    for work in (lambda: renderer.render([Message("user", text)]), lambda: renderer.encode_prompt(text)):
        with pytest.raises(TooLong, match=r"at least \d+ tokens; the model's context is 100"):
            work()


@given(st.text())
def test_the_bound_holds_for_the_served_models_tokenizer(model_path: str, text: str) -> None:
    tokenizer = tokenizer_of(model_path)
    bound = token_bytes(tokenizer.to_str())
    assert bound is not None
    assert bound.least(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


def test_what_may_fit_is_encoded(model_path: str) -> None:
    renderer, unbounded = ChatRenderer(model_path, context=lambda: 100), ChatRenderer(model_path)
    message = Message("user", "All work and no play. " * 30)
    assert renderer.render([message]) == unbounded.render([message])
    long = Message("user", "All work and no play. " * 10_000)
    assert len(unbounded.render([long]).token_ids) > 50_000, "without a context there is no bound"
