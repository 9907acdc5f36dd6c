"""A byte-level BPE tokenizer as it stands in tokenizer.json: its entries, merges and derivations.

Byte-level BPE (GPT-2) writes text as bytes, each byte as one printable character, and merges
neighbouring tokens, the merge of the lowest rank first, the leftmost of equals. SentencePiece
models (Unigram, or BPE that falls back to bytes) work otherwise and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from seodang.errors import InputError

TOKENIZER = "tokenizer.json"


def byte_characters() -> list[str]:
    """The character that stands for each of the 256 bytes (GPT-2's ``bytes_to_unicode``)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


class ByteLevelBPE:
    """The tokenizer of a model directory.

    ``content`` is the parsed tokenizer.json; ``vocab`` maps every entry, added tokens included, to
    its id; ``merges`` int32 (merges, 3) are the ids of left part, right part and result, by rank.
    """

    def __init__(self, directory: Path) -> None:
        """Read ``directory``; raises ``InputError`` if it holds no byte-level BPE tokenizer."""
        file = directory / TOKENIZER
        if not file.is_file():
            raise InputError(f"{directory}: no {TOKENIZER}, which trimming a vocabulary needs")
        self.content: dict[str, Any] = json.loads(file.read_bytes())
        if reason := why_not_byte_level(self.content):
            raise InputError(
                f"{file}: {reason}; only byte-level BPE can be trimmed: "
                "leave out student.vocabulary"
            )
        model = self.content["model"]
        added = {token["content"]: int(token["id"]) for token in self.content["added_tokens"]}
        self.added = frozenset(added.values())
        self.vocab: dict[str, int] = {**model["vocab"], **added}
        parts = [pair_of(merge) for merge in model["merges"]]
        self.merges = np.array(
            [(self.vocab[a], self.vocab[b], self.vocab[a + b]) for a, b in parts], np.int32
        ).reshape(-1, 3)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.vocab.values()) + 1

    @cached_property
    def text(self) -> dict[int, str]:
        """What each id writes, in the characters of :func:`byte_characters`."""
        return {token: text for text, token in self.vocab.items()}

    @cached_property
    def byte_ids(self) -> dict[str, int]:
        """The ids of the bytes that have an entry of their own, by character, in their order."""
        return {c: self.vocab[c] for c in byte_characters() if c in self.vocab}

    @property
    def missing_bytes(self) -> list[str]:
        """The characters of the bytes that have no entry: text with them is not written whole."""
        return [c for c in byte_characters() if c not in self.vocab]

    @cached_property
    def required(self) -> frozenset[int]:
        """Ids that no trimmed vocabulary can do without: bytes, added tokens, the unknown one."""
        unknown = self.content["model"].get("unk_token")
        named = {self.vocab[unknown]} if unknown in self.vocab else set()
        return frozenset({*self.byte_ids.values(), *self.added, *named})

    def parts(self, token: int) -> tuple[int, int] | None:
        """The two tokens that BPE joins last when it is run on the text of ``token`` alone.

        None for a byte, for an added token, and for one that no merge gives. Of a token with only
        one merge its parts, also in the rare case that BPE on its text never gets to that merge.
        """
        candidates = self._merges_of.get(token, [])
        if len(candidates) > 1:  # as in vocabularies made for tiktoken: every split is a merge
            return self._last_merge(token)
        return (candidates[0][0], candidates[0][1]) if candidates else None

    @cached_property
    def _merges_of(self) -> dict[int, list[tuple[int, int]]]:
        found: dict[int, list[tuple[int, int]]] = {}
        for left, right, result in self.merges.tolist():
            found.setdefault(result, []).append((left, right))
        return found

    @cached_property
    def _rank(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Rank and result of each merge."""
        return {(a, b): (rank, c) for rank, (a, b, c) in enumerate(self.merges.tolist())}

    def _last_merge(self, token: int) -> tuple[int, int] | None:
        rank, none = self._rank, (1 << 60, -1)
        symbols = [self.vocab[character] for character in self.text[token]]
        while len(symbols) > 1:
            found = [rank.get(pair, none) for pair in pairwise(symbols)]
            best = min(found)
            if best is none:
                return None
            at = found.index(best)
            if len(symbols) == 2:
                return symbols[0], symbols[1]
            symbols[at : at + 2] = [best[1]]
        return None


def why_not_byte_level(content: dict[str, Any]) -> str | None:
    """Why a parsed tokenizer.json is not byte-level BPE; None if it is."""
    model = content["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE":
        return f"a {kind} tokenizer"
    if model.get("byte_fallback"):
        return "a SentencePiece BPE, which falls back to bytes for what it does not know"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its tokens differ at the beginning or the end of a word"
    if not any(step.get("type") == "ByteLevel" for step in _steps(content.get("pre_tokenizer"))):
        return "its pre-tokenizer does not write text as bytes"
    return None


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    yield step
    for inner in step.get("pretokenizers", []):
        yield from _steps(inner)


def pair_of(merge: str | list[str]) -> tuple[str, str]:
    """The parts of a merge in either of the forms of tokenizer.json: ``"a b"``, ``["a", "b"]``."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def spell(
    texts: list[str], vocab: dict[str, int], merges: npt.NDArray[np.int32]
) -> list[list[int]]:
    """The ids that BPE with these entries and merges gives to each text, taken as one word.

    ``vocab`` maps texts to ids, ``merges`` (merges, 3) holds ids as in :class:`ByteLevelBPE`. A
    text with a character that is no entry has no spelling: an empty list.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    written = {token: text for text, token in vocab.items()}
    pairs = [(written[a], written[b]) for a, b, _ in merges.tolist()]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=pairs))
    alphabet = set(vocab)
    whole = [text if alphabet.issuperset(text) else "" for text in texts]
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(whole)]
