"""Token ids as text that can be shown: whole characters, and nothing that acts on a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what decoding gives for the bytes of a part of a character
_PENDING = 16  # tokens that may wait for the rest of a character
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Spelling:
    """How token ids are written: by a tokenizer, or as numbers without one.

    ``separator`` stands between the tokens of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._tokenizer = tokenizer
        self.separator = "" if tokenizer is not None else " "
        self.token = lru_cache(maxsize=65536)(self._token)
        # SentencePiece drops the space that begins a text, so tokens are spelled after another.
        self._anchor: list[int] = []
        if tokenizer is not None:
            self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]

    def _decode(self, token_ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(list(token_ids)))

    def _token(self, token: int) -> str:
        """One token in the middle of a text."""
        if self._tokenizer is None:
            return str(token)
        before, text = self._decode(self._anchor), self._decode([*self._anchor, token])
        return text[len(before) :] if text.startswith(before) else self._decode([token])

    def text(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token of a sequence; joined they are the sequence's text.

        A character that several tokens make up belongs to the last of them, the others are empty.
        """
        if self._tokenizer is None:
            return [str(token) for token in token_ids]
        pieces: list[str] = []
        before = start = 0  # of the tokens that give context, and of those that wait
        for index in range(len(token_ids)):
            known = self._decode(token_ids[before:start])
            text = self._decode(token_ids[before : index + 1])
            whole = not text.endswith(_BROKEN)
            if not whole and index + 1 < len(token_ids) and index - start < _PENDING:
                pieces.append("")
                continue
            if not text.startswith(known):
                known, text = "", self._decode(token_ids[start : index + 1])
            pieces.append(text[len(known) :])
            before, start = start if whole else index + 1, index + 1
        return pieces


def visible(text: str) -> str:
    """Text in which every control character is seen and none is obeyed.

    Controls become their pictures (U+2400 and following), marks that reorder text their code
    point. Line ends and tabs become ``↵`` and ``⇥``.
    """
    return "".join(map(_visible, text))


def laid_out(text: str) -> str:
    """As :func:`visible`, in lines: a line end and a tab are seen and also obeyed."""
    return "".join(_visible(c) + (c if c in "\n\t" else "") for c in text)


def _visible(character: str) -> str:
    if character == "\n":
        return "↵"
    if character == "\t":
        return "⇥"
    category = unicodedata.category(character)
    if category == "Cc" and ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    if character in _REORDERING or category in ("Cc", "Cs", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character


def named(token: int, text: str) -> str:
    """One token as a word of its own, the spaces at its ends seen.

    A part of a character, or a token without text, is named by its id.
    """
    if not text or _BROKEN in text:
        return f"⟨{token}⟩"
    shown = visible(text)
    words = shown.strip(" ")
    if not words:
        return "␣" * len(shown)
    left = len(shown) - len(shown.lstrip(" "))
    return "␣" * left + words + "␣" * (len(shown) - left - len(words))
