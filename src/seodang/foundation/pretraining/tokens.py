"""The raw corpus as token ids: flat shards, and an index of the documents in them.

    train-00000.bin       token ids end to end, little-endian uint16 (uint32 above 65,536 tokens)
    train-00000.parquet   a row per document: where its tokens stand, and what it is

A document is stored between two boundary tokens (the tokenizer's ``bos_token``, ``<|endoftext|>``),
so that its first token is predicted too. The layout follows that of Megatron-LM's indexed data sets
and of nanoGPT: training reads the shards by memory map.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from seodang.artifact import Artifact, begin, write_atomically
from seodang.causal_lm import load_tokenizer
from seodang.corpus.raw.reading import RawDocument, count_raw, read_raw
from seodang.errors import InputError
from seodang.progress import track

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

KIND = "tokens"
Side = Literal["train", "held-out"]
SIDES: tuple[Side, ...] = ("train", "held-out")
SHARD_TOKENS = 32 * 1024 * 1024
BATCH = 256  # documents that are tokenized together


def tokenize_raw(
    raw_corpus: Artifact,
    tokenizer: Artifact,
    out: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> Artifact:
    """Tokenize both sides of ``raw_corpus``; resumes after the last finished shard.

    A shard ends with the document that fills ``shard_tokens``. Raises ``InputError`` if the
    tokenizer has no token that can stand between documents.
    """
    encoder = load_tokenizer(tokenizer.path)
    boundary = boundary_id(encoder)
    config = {"shard_tokens": shard_tokens}
    inputs = {"raw_corpus": raw_corpus.digest, "tokenizer": tokenizer.digest}
    draft = begin(out, KIND, config, inputs)
    if isinstance(draft, Artifact):
        return draft
    summary: dict[str, Any] = {"vocabulary": len(encoder)}
    for side in SIDES:
        _write_side(raw_corpus.path, side, encoder, boundary, draft.path, shard_tokens)
        rows = _index(draft.path, side).to_pylist()
        languages = sorted({row["language"] for row in rows})
        summary[side] = {
            "documents": len(rows),
            "tokens": sum(row["tokens"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows),
            "tokens_by_language": {
                language: sum(row["tokens"] for row in rows if row["language"] == language)
                for language in languages
            },
        }
    return draft.finish(sources=raw_corpus.manifest.sources, summary=summary)


def boundary_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between documents: ``bos_token``, else ``eos_token``."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("the tokenizer has neither a bos_token nor an eos_token to end documents with")


def _write_side(
    raw_corpus: Path,
    side: Side,
    encoder: PreTrainedTokenizerBase,
    boundary: int,
    out: Path,
    shard_tokens: int,
) -> None:
    finished = _shards(out, side)
    done = _index(out, side).num_rows if finished else 0
    number = len(finished)
    documents = islice(read_raw(raw_corpus, side), done, None)
    kind = np.dtype("<u2" if len(encoder) <= 1 << 16 else "<u4")
    rows: list[dict[str, Any]] = []
    pieces: list[npt.NDArray[Any]] = []
    held = 0
    total = count_raw(raw_corpus, side)
    with track(f"Tokenizing ({side})", total, "doc", done) as advance:
        for document, ids in _tokenized(documents, encoder, boundary):
            pieces.append(np.array(ids, kind))
            rows.append(_row(document, held, len(ids)))
            held += len(ids)
            advance(1)
            if held >= shard_tokens:
                _write_shard(out, side, number, rows, pieces)
                number, rows, pieces, held = number + 1, [], [], 0
    if rows:
        _write_shard(out, side, number, rows, pieces)


def _tokenized(
    documents: Iterator[RawDocument], encoder: PreTrainedTokenizerBase, boundary: int
) -> Iterator[tuple[RawDocument, list[int]]]:
    while batch := list(islice(documents, BATCH)):
        texts = [document.text for document in batch]
        encoded = encoder(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        for document, ids in zip(batch, encoded["input_ids"], strict=True):
            yield document, [boundary, *ids, boundary]


def _row(document: RawDocument, start: int, tokens: int) -> dict[str, Any]:
    return {
        "id": document.id,
        "start": start,
        "tokens": tokens,
        "bytes": len(document.text.encode()),
        "language": document.language,
        "source": document.source,
    }


def _write_shard(
    out: Path,
    side: Side,
    number: int,
    rows: Sequence[dict[str, Any]],
    pieces: Sequence[npt.NDArray[Any]],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_atomically(out / f"{side}-{number:05d}.bin", np.concatenate(pieces).tobytes())
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    # Last: a shard with an index is finished.
    write_atomically(out / f"{side}-{number:05d}.parquet", buffer.getvalue())


def _shards(folder: Path, side: Side) -> list[Path]:
    return sorted(folder.glob(f"{side}-?????.parquet"))


def _index(folder: Path, side: Side) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "id": pa.string(),
            "start": pa.int64(),
            "tokens": pa.int64(),
            "bytes": pa.int64(),
            "language": pa.string(),
            "source": pa.string(),
        }
    )
    tables = [pq.read_table(file, schema=schema) for file in _shards(folder, side)]
    return pa.concat_tables(tables) if tables else schema.empty_table()


class TokenStore:
    """One side of a tokens artifact: documents by number, read by memory map.

    ``ids``, ``languages`` and ``sources`` are lists of strings, ``lengths`` (with both boundary
    tokens) and ``bytes`` (of the text) int64 arrays, all with an entry per document.
    """

    def __init__(self, artifact: Artifact, side: Side) -> None:
        self.artifact = artifact
        table = _index(artifact.path, side)
        self.ids: list[str] = table["id"].to_pylist()
        self.languages: list[str] = table["language"].to_pylist()
        self.sources: list[str] = table["source"].to_pylist()
        self.lengths = table["tokens"].to_numpy().astype(np.int64)
        self.bytes = table["bytes"].to_numpy().astype(np.int64)
        starts = table["start"].to_numpy().astype(np.int64)
        self._starts = starts
        self._shard_of = np.cumsum(starts == 0) - 1  # every shard begins at 0
        small = artifact.manifest.summary["vocabulary"] <= 1 << 16
        self._shards = [
            np.memmap(file.with_suffix(".bin"), "<u2" if small else "<u4", mode="r")
            for file in _shards(artifact.path, side)
        ]

    @property
    def vocabulary(self) -> int:
        """Size of the tokenizer."""
        return int(self.artifact.manifest.summary["vocabulary"])

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.ids)

    def tokens(self, document: int, begin: int = 0, end: int | None = None) -> npt.NDArray[Any]:
        """The ids of a document from token ``begin`` to before ``end``, int64."""
        start = int(self._starts[document])
        stop = start + (int(self.lengths[document]) if end is None else end)
        shard = self._shards[int(self._shard_of[document])]
        return np.asarray(shard[start + begin : stop], np.int64)
