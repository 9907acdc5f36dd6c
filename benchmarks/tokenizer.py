"""Tokens per character of Korean, English and code, on held-out text.

    python benchmarks/tokenizer.py runs/nano/raw-corpus runs/nano/tokenizer smollm2=DIR ...

Each further argument names a tokenizer to compare with and the directory that holds its
tokenizer.json. The text is the held-out side of the raw corpus, which the tokenizer has not seen;
the others may have seen any of it. Prints a table, each cell with its share of the first other
one's tokens, and what handling digits, Hangul and half characters on purpose costs or saves:
tokenizers trained on the same sample with one thing changed at a time.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from seodang.artifact import Artifact
from seodang.causal_lm import load_tokenizer
from seodang.corpus.raw.reading import read_raw
from seodang.foundation.tokenizer.bpe import MAX_CHARACTERS, PATTERN, train_bpe
from seodang.foundation.tokenizer.config import RESERVED, TokenizerConfig
from seodang.foundation.tokenizer.train import sample
from seodang.student.byte_level_bpe import byte_characters

LANGUAGES = ("ko", "en", "code")
ROWS = "{:<34}" + "{:>18}" * 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw_corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("others", nargs="*", metavar="NAME=DIR")
    options = parser.parse_args()

    raw = Artifact.open(options.raw_corpus, "raw-corpus")
    ours = Artifact.open(options.tokenizer, "tokenizer")
    text: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for document in read_raw(raw.path, "held-out"):
        text[document.language].append(document.text)
    sizes = {language: sum(map(len, texts)) for language, texts in text.items()}
    print(ROWS.format("held-out characters", *(f"{sizes[name]:,}" for name in LANGUAGES)))

    named = dict(other.split("=", 1) for other in options.others)
    rows = {name: load_tokenizer(Path(folder)).backend_tokenizer for name, folder in named.items()}
    found = {name: rates(backend, text) for name, backend in rows.items()}
    mine = load_tokenizer(ours.path).backend_tokenizer
    found = {f"ours ({mine.get_vocab_size():,})": rates(mine, text), **found}
    base = list(found.values())[1 if len(found) > 1 else 0]
    print("\n" + ROWS.format("tokens per character", *LANGUAGES))
    for name, rate in found.items():
        print(ROWS.format(name, *(cell(rate[k], base[k]) for k in LANGUAGES)))

    config = TokenizerConfig(**ours.manifest.config)
    texts, _ = sample(config, raw)
    entries = config.vocabulary - len(RESERVED) - config.spare_tokens
    print("\n" + ROWS.format("one thing changed", *LANGUAGES))
    first = rates(train_bpe(texts, entries, config.min_character_count), text)
    print(ROWS.format("as it is", *(cell(first[k], first[k]) for k in LANGUAGES)))
    for name, change in CHANGES.items():
        tokenizer = change(texts, entries)
        rate = rates(tokenizer, text)
        print(ROWS.format(name, *(cell(rate[k], first[k]) for k in LANGUAGES)), half(tokenizer))
    decomposed = {"ko": [unicodedata.normalize("NFD", t) for t in text["ko"]], "en": [], "code": []}
    plain = load_tokenizer(ours.path).backend_tokenizer
    plain.normalizer = None
    for name, backend in (("decomposed Hangul", mine), ("decomposed, without NFC", plain)):
        tokens = sum(len(e.ids) for e in backend.encode_batch(decomposed["ko"]))
        print(ROWS.format(name, cell(tokens / sizes["ko"], first["ko"]), "", ""))


def rates(tokenizer: Tokenizer, text: dict[str, list[str]]) -> dict[str, float]:
    """Tokens over characters, by language."""
    return {
        language: sum(len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False))
        / max(1, sum(map(len, texts)))
        for language, texts in text.items()
    }


def cell(rate: float, base: float) -> str:
    return f"{rate:.4f} ({rate / base:.1%})"


def plain_bpe(pattern: str) -> Callable[[list[str], int], Tokenizer]:
    """Byte-level BPE as the library trains it, on bytes, with this pattern."""

    def train(texts: list[str], entries: int) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=entries,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            max_token_length=MAX_CHARACTERS,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    return train


def half(tokenizer: Tokenizer) -> str:
    """How many entries join a piece of a character to something else."""
    byte = {character: number for number, character in enumerate(byte_characters())}
    crossing = 0
    for entry in json.loads(tokenizer.to_str())["model"]["vocab"]:
        spelled = bytes(byte[character] for character in entry)
        text = spelled.decode(errors="ignore")
        if len(spelled) > 1:
            crossing += text.encode() != spelled if text else spelled[0] < 0xC2
    return f"  {crossing:,} entries cross half a character"


_DIGITS: dict[str, Any] = {
    "three digits, from the right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    "three digits, from the left": r"\p{N}{1,3}",
}
CHANGES = {
    "merges on bytes": plain_bpe(PATTERN),
    **{
        name: plain_bpe(PATTERN.replace(r"|\p{N}|", f"|{digits}|"))
        for name, digits in _DIGITS.items()
    },
}

if __name__ == "__main__":
    main()
