"""How many bytes of text one token stands for at most, so that a text that is too long is known without encoding it.

A bound is given only where one can be told from the tokenizer's own description: where it is known which bytes become
part of some token (no unknown characters that are fused, no white space that is removed), and what normalises a text
does not make it much shorter.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from guiderail.server.models.token_spelling import BYTE_OF

NFC_SHRINKS = 3  # in UTF-8 at most, by Unicode's FAQ on normalization


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """A token stands for so many bytes of UTF-8 at most. dropped: bytes that no token stands for."""

    longest: int
    dropped: bytes = b""

    def least(self, text: str) -> int:
        """Return a number of tokens that the text has at least."""
        return math.ceil(len(text.encode(errors="surrogatepass").translate(None, self.dropped)) / self.longest)


def token_bytes(description: str) -> TokenBytes | None:
    """Return the bound for a tokenizer, None where there is no sound one.

    description: the JSON of a tokenizer of the library `tokenizers`.
    """
    tokenizer: dict[str, Any] = json.loads(description)
    model = tokenizer["model"]
    shrinks = _shrinks(tokenizer.get("normalizer"))
    splits = _splits(tokenizer.get("pre_tokenizer"))
    strips = any(token["lstrip"] or token["rstrip"] for token in tokenizer["added_tokens"])
    if model["type"] != "BPE" or shrinks is None or splits is None or strips:
        return None
    vocabulary, dropped = model["vocab"], b""
    if "ByteLevel" in splits:  # a character of a token's text is a byte
        dropped = bytes(byte for character, byte in BYTE_OF.items() if character not in vocabulary)
        if dropped and (model.get("unk_token") is not None or shrinks > 1):
            return None
        longest = max(map(len, vocabulary))
    else:
        by_bytes = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        if not by_bytes and (model.get("unk_token") is None or model.get("fuse_unk")):
            return None
        longest = max(4, *(len(text.encode()) for text in vocabulary))
    longest = max([longest, *(len(token["content"].encode()) for token in tokenizer["added_tokens"])])
    return TokenBytes(longest * shrinks, dropped)


def _shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """Return the factor by which a normaliser makes texts shorter at most, None if it is not known."""
    kind = None if normalizer is None else normalizer["type"]
    if normalizer is None or kind == "Prepend":
        return 1
    if kind == "NFC":
        return NFC_SHRINKS
    if kind == "Replace":
        old, new = normalizer["pattern"].get("String"), normalizer["content"]
        return 1 if old and len(new.encode()) >= len(old.encode()) else None
    if kind == "Sequence":
        product = 1
        for each in normalizer["normalizers"]:
            if (factor := _shrinks(each)) is None:
                return None
            product *= factor
        return product
    return None


def _splits(pre_tokenizer: dict[str, Any] | None) -> list[str] | None:
    """Return the kinds of a pre-tokenizer's parts, None if one may remove text."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        parts = [_splits(each) for each in pre_tokenizer["pretokenizers"]]
        return None if None in parts else [name for part in parts for name in part or ()]
    keeps = kind in ("ByteLevel", "Digits", "Metaspace") or (
        kind in ("Split", "Punctuation") and pre_tokenizer["behavior"] != "Removed"
    )
    return [kind] if keeps else None
