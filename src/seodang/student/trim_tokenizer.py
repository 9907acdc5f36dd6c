"""The tokenizer files of a student with a trimmed vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from seodang.artifact import write_atomically
from seodang.student.byte_level_bpe import TOKENIZER, ByteLevelBPE, pair_of
from seodang.student.trimmed import TrimmedVocabulary

_CONFIG = "tokenizer_config.json"
_ADDED = "added_tokens.json"
_COPIED = ("special_tokens_map.json", "chat_template.jinja")  # they name tokens by their text


def trim_tokenizer(source: Path, vocabulary: TrimmedVocabulary, out: Path) -> None:
    """Write the tokenizer of the model directory ``source``, trimmed, into ``out``.

    Entries and merges that are not kept go; ids change wherever tokenizer.json and
    tokenizer_config.json hold any; pre-tokenizer, normalizer, decoder, special tokens and chat
    template stay as they are.

    Raises ``InputError`` if the tokenizer is not byte-level BPE, ``ValueError`` if the vocabulary
    is not one of it.
    """
    bpe = ByteLevelBPE(source)
    if bpe.size > vocabulary.old_size:
        raise ValueError(f"a vocabulary of {vocabulary.old_size} ids, {source} has {bpe.size}")
    write_atomically(out / TOKENIZER, _written(_trimmed(bpe, vocabulary)))
    if (source / _CONFIG).is_file():
        config = json.loads((source / _CONFIG).read_bytes())
        write_atomically(out / _CONFIG, _written(_mapped(config, vocabulary)))
    if (source / _ADDED).is_file():
        added = json.loads((source / _ADDED).read_bytes())
        mapped = {text: int(vocabulary.new_ids[i]) for text, i in added.items()}
        write_atomically(out / _ADDED, _written(mapped))
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _trimmed(bpe: ByteLevelBPE, vocabulary: TrimmedVocabulary) -> dict[str, Any]:
    """The parsed tokenizer.json in the new ids."""
    new_ids = vocabulary.new_ids
    old = bpe.content["model"]
    entries = {text: int(new_ids[i]) for text, i in old["vocab"].items() if new_ids[i] >= 0}
    first_byte = vocabulary.size - len(bpe.missing_bytes)
    entries |= {character: first_byte + i for i, character in enumerate(bpe.missing_bytes)}
    kept: list[bool] = np.all(new_ids[bpe.merges] >= 0, axis=1).tolist()
    merges = [list(pair_of(m)) for m, stays in zip(old["merges"], kept, strict=True) if stays]
    content: dict[str, Any] = _mapped(
        {k: v for k, v in bpe.content.items() if k != "model"}, vocabulary
    )
    entries = dict(sorted(entries.items(), key=lambda entry: entry[1]))
    return {**content, "model": {**old, "vocab": entries, "merges": merges}}


def _mapped(value: Any, vocabulary: TrimmedVocabulary, key: str = "") -> Any:
    """``value``, which stands under ``key``, with every token id in it mapped."""
    match value:
        case dict():
            if key == "added_tokens_decoder":
                return {
                    str(vocabulary.new_ids[int(i)]): token
                    for i, token in value.items()
                    if vocabulary.new_ids[int(i)] >= 0
                }
            return {k: _mapped(v, vocabulary, k) for k, v in value.items()}
        case [str(text), int(i)] if key in ("sep", "cls"):  # BERT's and RoBERTa's template
            return [text, int(vocabulary.new_ids[i])]
        case list():
            return [_mapped(item, vocabulary, key) for item in value]
        case int() if key in ("id", "ids", "pad_id") or key.endswith("_token_id"):
            return int(vocabulary.new_ids[value])
        case _:
            return value


def _written(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
