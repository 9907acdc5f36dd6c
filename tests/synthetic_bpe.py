"""Synthetic byte-level BPE tokenizers of any size, in the forms in which real ones are published.

The entries are random: only their number and form are those of real tokenizers.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seodang.release.gguf import _split
from seodang.student.byte_level_bpe import byte_characters
from tiny import CHATML

Style = Literal["gpt2", "llama3", "qwen"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
LONGEST = 12  # bytes of an entry
_SPACE = "Ġ"


def synthetic_bpe(directory: Path, size: int, style: Style = "gpt2", seed: int = 0) -> Path:
    """Write a tokenizer of ``size`` entries: bytes, random merges of letters, special tokens.

    ``gpt2``: one merge for each entry, as BPE training gives. ``llama3`` and ``qwen``: every split
    of an entry into two others is a merge, as in tokenizers made from tiktoken's; Llama 3 also
    looks whole words up before it merges, and begins every text with a special token.
    """
    entries, merges = random_merges(size - len(SPECIAL), np.random.default_rng(seed))
    vocab = {text: i for i, text in enumerate(entries)}
    if style != "gpt2":
        merges = every_split(entries, vocab)
    first = len(vocab)
    added = [
        {
            "id": first + i,
            "content": text,
            "special": text != "<tool>",
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, text in enumerate(SPECIAL)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict[str, Any]] = [{**byte_level, "use_regex": True}]
    if style != "gpt2":
        digits = "{1,3}" if style == "llama3" else ""
        steps = [_split(digits), {**byte_level, "use_regex": False}]
    begin = {"id": SPECIAL[1], "ids": [first + 1], "tokens": [SPECIAL[1]]}
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": SPECIAL[1], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {SPECIAL[1]: begin},
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if style == "qwen" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": template if style == "llama3" else None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": style == "llama3",
            "vocab": vocab,
            "merges": [f"{a} {b}" for a, b in merges] if style == "qwen" else merges,
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2],
        "chat_template": CHATML,
        "added_tokens_decoder": {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def random_merges(size: int, rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str]]]:
    """Entries, the bytes first, and the merge that made each of the others.

    The parts are mostly early entries, as in real tokenizers. BPE may reach a few entries by
    another way than their merge, or not at all, as in real ones too.
    """
    entries = byte_characters()
    letters = [*"etaoinshrdlucmfwypvbgkjqxz", _SPACE, *(chr(c) for c in range(0xEA, 0xEE))]
    pool = letters + [entries[i] for i in range(0x80, 0xC0)]  # Hangul begins with EA to ED
    known, merges = set(entries), []
    while len(entries) < size:
        for u, v in rng.random((size, 2)) ** 2:
            left, right = pool[int(u * len(pool))], pool[int(v * len(pool))]
            text = left + right
            if _SPACE not in right and len(text) <= LONGEST and text not in known:
                known.add(text)
                entries.append(text)
                pool.append(text)
                merges.append((left, right))
                if len(entries) == size:
                    break
    return entries, merges


def every_split(entries: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of entries that makes an entry, by the rank of what it makes."""
    merges = []
    for text in entries:
        splits = [(text[:i], text[i:]) for i in range(1, len(text))]
        found = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges += sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def naive_bpe(text: str, vocab: dict[str, int], merges: list[tuple[str, str]]) -> list[int]:
    """BPE as it is defined, for comparison: the merge of the lowest rank, leftmost first."""
    rank = {pair: i for i, pair in enumerate(merges)}
    symbols = list(text)
    while pairs := [pair for pair in pairwise(symbols) if pair in rank]:
        best = min(pairs, key=rank.__getitem__)
        at = next(i for i, pair in enumerate(pairwise(symbols)) if pair == best)
        symbols[at : at + 2] = ["".join(best)]
    return [vocab[symbol] for symbol in symbols]
