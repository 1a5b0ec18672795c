"""The bytes of tokens join to the text they were made of, where the tokenizer allows to say."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from guiderail.server.models.token_spelling import TokenSpelling

TEXTS = ["Two emoji: 😀🚀!", "naïve café, 世界 ", "a  b\n\n\tc", "", "\ufffd", "<0xE2> is text here"]


def pieces(*, strip: bool = False) -> Tokenizer:
    """Pieces with bytes to fall back on, as sentencepiece's models are converted."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if strip else "never", split=False)
    names = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *names], show_progress=False)
    made.train_from_iterator(["Two emoji is text here, a b c"], trainer)
    said = json.loads(made.to_str())
    said["added_tokens"] = said["added_tokens"][:1]
    made = Tokenizer.from_str(json.dumps(said))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return made


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_and_bytes_join_to_the_text(text: str) -> None:
    made = pieces()
    known = [TokenSpelling(made).of(i) for i in made.encode(text).ids]
    assert None not in known
    assert b"".join(each for each in known if each is not None) == text.encode()


@given(st.text(max_size=30))
def test_a_space_at_the_start_is_of_the_token_and_not_of_the_text(text: str) -> None:
    made = STRIPPING
    ids = made.encode(text).ids
    joined = b"".join(STRIPPED.of(i) or b"" for i in ids)
    assert joined in (text.encode(), b" " + text.encode())


STRIPPING = pieces(strip=True)
STRIPPED = TokenSpelling(STRIPPING)


def test_byte_level_tokens_are_their_bytes_and_control_tokens_their_text(model_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    known = TokenSpelling(tokenizer.backend_tokenizer)
    for text in [*TEXTS, "<|im_end|>", "".join(map(chr, range(0x250)))]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(known.of(i) or b"" for i in ids) == tokenizer.decode(ids).encode()
    assert known.of(10**9) == b""


@pytest.mark.parametrize(
    "decoder", [None, decoders.WordPiece(), decoders.BPEDecoder(), decoders.Sequence([decoders.Replace("a", "b")])]
)
def test_what_another_decoder_does_is_not_guessed(decoder: Any) -> None:
    made = pieces()
    made.decoder = decoder
    assert TokenSpelling(made).of(made.token_to_id("T")) is None
