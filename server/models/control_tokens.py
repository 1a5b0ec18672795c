"""The control tokens of a tokenizer, and the encoding of texts in which only some of what looks like one is one.

A tokenizer takes every text apart at its control tokens ("<|im_end|>") before anything else, wherever they stand. Here
the ones that count are marked, and all others are read like any text, in one run with what stands around them. Nobody
outside of this process knows the marks: they begin with characters that are drawn at random when it starts.
"""

import re
import secrets
from collections.abc import Sequence
from typing import Any

from guiderail.guides.core.errors import GuiderailError, RequestError

# Characters that no text has a meaning for: the first ones of marks, their last one, and those that hide a content's.
_DRAWN_FROM, _NUMBERS, DISGUISE = range(0xE000, 0xF900), 0x100000, range(0xF0000, 0xFFFFE)


class ControlTokens:
    """Finds and marks control tokens in texts, and encodes both marked texts and others. Safe in several threads."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: of transformers. Raises GuiderailError for one that is not of the library `tokenizers`."""
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            kind = type(tokenizer).__name__
            raise GuiderailError(f"a {kind} cannot tell text from control tokens; a tokenizer.json is needed")
        self._tokenizer = tokenizer
        named = set(tokenizer.all_special_tokens)  # few are not marked as special in what the tokenizer was made of
        added = backend.get_added_tokens_decoder()
        control = {i: token for i, token in added.items() if token.special or token.content in named}
        # A copy, as reading control tokens as text is a state of the tokenizer that other threads would meet.
        self._plain = Tokenizer.from_str(backend.to_str())
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = True
        start = "".join(chr(secrets.choice(_DRAWN_FROM)) for _ in range(6))
        self._marks = {t.content: start + chr(_NUMBERS + n) for n, t in enumerate(control.values(), start=1)}
        self._break = start + chr(_NUMBERS)
        self._plain.add_tokens([AddedToken(self._break, normalized=False, special=False)])
        self._plain.add_tokens(
            [
                AddedToken(
                    self._marks[t.content], single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip,
                    normalized=t.normalized, special=False,
                )
                for t in control.values()
            ]
        )  # fmt: skip
        self._ids = {self._plain.token_to_id(self._marks[t.content]): i for i, t in control.items()}
        self._dropped = self._plain.token_to_id(self._break)
        # Unknown characters may become one that is called special, or bytes that are.
        of_text = {getattr(self._plain.model, "unk_token", None), *(f"<0x{byte:02X}>" for byte in range(256))}
        self._never = frozenset(i for i, token in control.items() if token.content not in of_text)
        self._pattern = re.compile(_any_of(list(self._marks)) if control else r"(?!)")
        self._alphabet = sorted({ord(c) for text in self._marks for c in text if not c.isspace()})

    def find(self, text: str) -> list[str]:
        """Return what looks like a control token in a text, in its order."""
        return self._pattern.findall(text)

    def mark(self, text: str) -> str:
        """Return the text with a mark in the place of everything that looks like a control token."""
        return self._pattern.sub(lambda found: self._marks[found[0]], text)

    def disguise(self, contents: Sequence[str]) -> dict[int, int]:
        """Return for each character that control tokens are made of one that none of the contents has.

        Raises RequestError if there is no such character left.
        """
        used = {c for content in contents for c in content if ord(c) in DISGUISE}
        free = (code for code in DISGUISE if chr(code) not in used)
        table = dict(zip(self._alphabet, free, strict=False))
        if len(table) < len(self._alphabet):
            raise RequestError("the messages have too many characters of Unicode's private use planes", "messages")
        return table

    def hide(self, content: str, table: dict[int, int]) -> str:
        """Return the content with all that looks like a control token in the characters of a disguise."""
        return self._pattern.sub(lambda found: found[0].translate(table), content)

    def encode(self, texts: Sequence[str], *, marked: bool, add_special_tokens: bool = False) -> list[list[int]]:
        """Return the token ids of each text: as the tokenizer reads it, or, if they are marked, with the control tokens
        that have marks and no other one. add_special_tokens: begin them like a prompt (BOS if the model has one).
        """
        if not texts:
            return []
        if not marked:
            ids: list[list[int]] = self._tokenizer(
                list(texts), add_special_tokens=add_special_tokens, split_special_tokens=False
            )["input_ids"]
            return ids
        return [
            self._unmarked(text, found, add_special_tokens)
            for text, found in zip(
                texts, self._plain.encode_batch(list(texts), add_special_tokens=add_special_tokens), strict=True
            )
        ]

    def _unmarked(self, text: str, found: Any, add_special_tokens: bool) -> list[int]:
        """Return the ids of an encoded text, control tokens in the place of marks."""
        if self._from_text(found):  # a vocabulary that has a control token's text as an ordinary piece as well
            apart = self._pattern.sub(lambda token: token[0][0] + self._break + token[0][1:], text)
            found = self._plain.encode(apart, add_special_tokens=add_special_tokens)
            if self._from_text(found):
                raise RequestError("a text has a control token that the model's tokenizer cannot read as text")
        return [self._ids.get(i, i) for i in found.ids if i != self._dropped]

    def _from_text(self, found: Any) -> bool:
        return not self._never.isdisjoint(found.ids) and any(
            i in self._never and not by_rule for i, by_rule in zip(found.ids, found.special_tokens_mask, strict=True)
        )


def _any_of(texts: Sequence[str]) -> str:
    """Return a pattern of any of these texts, the longest one possible, that takes no longer for being many."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}

    def pattern(node: dict[str, Any]) -> str:
        ends = "" in node
        branches = []
        for character, below in node.items():
            if character:
                branches.append(re.escape(character) + pattern(below))
        if not branches:
            return ""
        if len(branches) == 1 and not ends:
            return branches[0]
        return f"(?:{'|'.join(branches)})" + ("?" if ends else "")

    return pattern(tree)
