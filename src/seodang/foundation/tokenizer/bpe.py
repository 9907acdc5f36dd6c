"""Byte-level BPE whose merges never cross half a character.

Run on bytes, BPE also learns pieces like the last byte of one Hangul syllable with the whole next
one, which no text needs and no reader can be shown (Land and Arnett, "BPE stays on SCRIPT", arXiv
2505.24689). So BPE is trained on characters here and then written in bytes: merges that put the
frequent characters together come first, the learned ones after them. The result is plain
byte-level BPE to whoever reads the file. Each entry is a byte, the first bytes of one character,
or whole characters; a rare syllable or a conjoining jamo is spelled by its bytes.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ASCII = [chr(code) for code in range(128)]
MAX_CHARACTERS = 32  # of an entry: longer ones are rulers of dashes, not words

# GPT-4's pattern with one digit in a piece, as Qwen2 has it (and llama.cpp knows as `qwen2`). A
# word is letters with the one space before them, so a Korean eojeol is one piece, and where its
# particle is cut off is left to the counts.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Sequence[str], entries: int, min_character_count: int) -> Tokenizer:
    """Train a tokenizer of at most ``entries`` entries: fewer if ``texts`` give no more.

    Text is composed (NFC) first, here and by the tokenizer: decomposed Hangul, as file names from
    a Mac have it, is then the same words, and not seven times the tokens. Equal texts in any order
    give the same tokenizer.

    Args:
        texts: what to learn from.
        entries: of the vocabulary, the 256 bytes included; no added token is among them.
        min_character_count: occurrences from which a character outside ASCII has an entry.

    Raises:
        ValueError: if the bytes and the frequent characters alone are more than ``entries``.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    characters = frequent_characters(texts, min_character_count)
    vocab, merges = _spelled_characters(characters)
    if len(vocab) > entries:
        raise ValueError(
            f"{len(vocab)} entries for bytes and characters, {entries} for all: raise "
            "min_character_count or the vocabulary"
        )
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = _split()
    alphabet = [*ASCII, *characters]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + entries - len(vocab),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=MAX_CHARACTERS,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        _merge(vocab, merges, in_bytes(left), in_bytes(right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [_split(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def frequent_characters(texts: Iterable[str], min_count: int) -> list[str]:
    """The characters beyond ASCII that occur ``min_count`` times, the most frequent first."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(unicodedata.normalize("NFC", text))
    found = [(-n, c) for c, n in counts.items() if n >= min_count and not c.isascii()]
    return [character for _, character in sorted(found)]


def in_bytes(text: str) -> str:
    """``text`` as byte-level BPE writes it: one printable character for each byte of UTF-8."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((spelled, _),) = level.pre_tokenize_str(text)
    return str(spelled)


def _split() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")


def _spelled_characters(characters: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The bytes, and the merges that put each character together from its first byte on."""
    from tokenizers import pre_tokenizers

    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for character in characters:
        spelled = in_bytes(character)
        for end in range(1, len(spelled)):
            if spelled[: end + 1] not in vocab:
                _merge(vocab, merges, spelled[:end], spelled[end])
    return vocab, merges


def _merge(vocab: dict[str, int], merges: list[tuple[str, str]], left: str, right: str) -> None:
    vocab.setdefault(left + right, len(vocab))
    merges.append((left, right))
