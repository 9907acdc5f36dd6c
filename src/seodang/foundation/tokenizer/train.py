"""The tokenizer's stage: a sample of the raw corpus to a Hugging Face tokenizer directory.

    train_tokenizer(TokenizerConfig(), Artifact.open("runs/nano/raw-corpus"), Path("tokenizer"))

Digits stand alone, each its own token: groups of three would take 1,110 of 16,384 entries, hide
the place of a digit from a small model (Singh and Strouse, arXiv 2402.14903), and from the right
they are a pattern that llama.cpp does not have. `benchmarks/tokenizer.py` measures what it costs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.artifact import Artifact, begin, write_atomically, write_json
from seodang.corpus.raw.reading import RawDocument, read_raw
from seodang.errors import InputError
from seodang.foundation.tokenizer.bpe import train_bpe
from seodang.foundation.tokenizer.config import RESERVED, TokenizerConfig
from seodang.progress import say

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KIND = "tokenizer"
# Skipped when text is decoded for people. Thoughts and calls are not: parsers look for them.
SPECIAL = frozenset({"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"})


def train_tokenizer(config: TokenizerConfig, raw_corpus: Artifact, out: Path) -> Artifact:
    """Train the tokenizer on the training side of ``raw_corpus``, into ``out``.

    ``out`` is then what ``AutoTokenizer.from_pretrained`` loads: tokenizer.json, its config and the
    chat template, whose ``enable_thinking`` lets a prompt end in ``<think>`` or in ``</think>``
    (the default). ``<|endoftext|>`` stands before every document of pretraining, ``<|im_end|>``
    ends a turn. The summary holds tokens per character of the held-out side.

    Raises ``InputError`` if the corpus lacks a language of the mixture, or is too small to give
    as many entries as the config asks for.
    """
    draft = begin(out, KIND, config.model_dump(), {"raw_corpus": raw_corpus.digest})
    if isinstance(draft, Artifact):
        return draft
    texts, sampled = sample(config, raw_corpus)
    say(f"Training the tokenizer on {sum(sampled.values()) / 1e6:.1f} MB of text")
    reserved = [*RESERVED, *(f"<|spare_{i}|>" for i in range(config.spare_tokens))]
    entries = config.vocabulary - len(reserved)
    try:
        tokenizer = train_bpe(texts, entries, config.min_character_count)
    except ValueError as error:
        raise InputError(f"tokenizer: {error}") from None
    if (found := tokenizer.get_vocab_size()) < entries:
        raise InputError(
            f"tokenizer.vocabulary: {raw_corpus.path} gives {found + len(reserved):,} entries, not "
            f"{config.vocabulary:,}; ask for fewer, or collect more text"
        )
    save(tokenizer, reserved, draft.path)
    summary = {
        "vocabulary": config.vocabulary,
        "sampled_bytes": sampled,
        "tokens_per_character": tokens_per_character(tokenizer, raw_corpus),
    }
    return draft.finish(sources=raw_corpus.manifest.sources, summary=summary)


def sample(config: TokenizerConfig, raw_corpus: Artifact) -> tuple[list[str], dict[str, int]]:
    """The texts to train on, and how many bytes of each language they hold.

    As much as ``config`` allows and the scarcest language has, so that the languages weigh what
    the mixture says; the documents are those with the smallest ids, which are hashes.
    """
    sizes: dict[str, list[tuple[str, int]]] = {language: [] for language in config.mixture}
    for document in _documents(config, raw_corpus):
        sizes[document.language].append((document.id, len(document.text.encode())))
    shares = config.shares()
    for language, found in sizes.items():
        if not found:
            raise InputError(
                f"tokenizer.mixture: {raw_corpus.path} has no text of language {language!r}"
            )
    total = min(sum(size for _, size in sizes[language]) / shares[language] for language in sizes)
    total = min(total, config.sample_bytes)
    chosen: set[str] = set()
    sampled = dict.fromkeys(sizes, 0)
    for language, found in sizes.items():
        for identity, size in sorted(found):
            if sampled[language] < total * shares[language]:
                chosen.add(identity)
                sampled[language] += size
    texts = [d.text for d in _documents(config, raw_corpus) if d.id in chosen]
    return texts, sampled


def _documents(config: TokenizerConfig, raw_corpus: Artifact) -> Iterator[RawDocument]:
    return (d for d in read_raw(raw_corpus.path, "train") if d.language in config.mixture)


def tokens_per_character(tokenizer: Tokenizer, raw_corpus: Artifact) -> dict[str, float]:
    """Tokens over characters of the held-out documents, by language."""
    texts: dict[str, list[str]] = {}
    for document in read_raw(raw_corpus.path, "held-out"):
        texts.setdefault(document.language, []).append(document.text)
    found = {}
    for language, of_language in sorted(texts.items()):
        encodings = tokenizer.encode_batch(of_language, add_special_tokens=False)
        characters = sum(map(len, of_language))
        found[language] = round(sum(len(e.ids) for e in encodings) / characters, 4)
    return found


def save(tokenizer: Tokenizer, reserved: list[str], directory: Path) -> None:
    """Write the files of a Hugging Face tokenizer, ``reserved`` as the last entries."""
    from tokenizers import AddedToken

    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=t in SPECIAL or "spare" in t) for t in reserved]
    )
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    write_json(directory / "tokenizer.json", content)
    # Written here and not by transformers, whose versions write it differently.
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|pad|>",
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        },
    )
    template = files("seodang.foundation.tokenizer").joinpath("chat_template.j2").read_bytes()
    write_atomically(directory / "chat_template.jinja", template)
