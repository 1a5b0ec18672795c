"""The bytes that each token of a vocabulary stands for, where the tokenizer's decoder says that exactly.

Byte-level tokens spell their bytes in a code of printable characters. Pieces of sentencepiece are text with a mark for
a space, and <0xE2> for a byte alone. What other decoders do depends on more than the token: of those nothing is said.
"""

import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenSpelling:
    """Bytes by token id."""

    def __init__(self, backend: Any) -> None:
        """backend: a Tokenizer of the library `tokenizers`."""
        self._backend = backend
        kinds = _steps(backend.decoder)
        self._byte_level = kinds == ["ByteLevel"]
        # A space before the first word of all that is decoded may be dropped besides: that is not of the token.
        self._pieces = bool(kinds) and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        self._fallback = "ByteFallback" in kinds

    def of(self, token_id: int) -> bytes | None:
        """Return the bytes of a token; None if they cannot be told from the token alone."""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:  # as the decoder does it, for added tokens too
            known = all(character in BYTE_OF for character in piece)
            return bytes(BYTE_OF[character] for character in piece) if known else bytes(piece.encode())
        if not self._pieces:
            return None
        if self._fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return bytes(piece.replace("\u2581", " ").encode())


def _steps(decoder: Any) -> list[str]:
    """Return the kinds of a decoder's steps; a replacement of anything but the mark of a space is a kind of its own."""
    if decoder is None:
        return []
    said = json.loads(decoder.__getstate__())
    steps = said["decoders"] if said["type"] == "Sequence" else [said]
    kinds = []
    for step in steps:
        plain = step["type"] != "Replace" or (step["pattern"], step["content"]) == ({"String": "\u2581"}, " ")
        plain = plain and (step["type"] != "Strip" or (step["content"], step["stop"]) == (" ", 0))
        kinds.append(step["type"] if plain else "other")
    return kinds


def _code() -> dict[str, int]:
    """Return the byte of each character of the code of GPT-2, which byte-level tokenizers share."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = _code()
