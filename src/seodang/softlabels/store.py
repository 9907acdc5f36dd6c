"""The store: an artifact of Parquet shards, one row per sequence.

Readable columns for any Parquet reader, and one binary column with the packed records. What a
record means (codec version, estimator and its parameters, temperature, vocabulary, fingerprints
of teacher and tokenizer) stands in the schema metadata under ``seodang``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from seodang.artifact import Artifact
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError
from seodang.recipe import EstimatorName, Layout
from seodang.softlabels.codec import CODEC_VERSION, decode, encode
from seodang.softlabels.estimators import Entries, weights

_COLUMNS = [
    ("sequence_digest", pa.string()),
    ("document_id", pa.string()),
    ("token_ids", pa.list_(pa.int32())),
    ("labelled", pa.list_(pa.int32())),
    ("entropy", pa.list_(pa.float32())),
    ("head_mass", pa.list_(pa.float32())),
    ("record", pa.binary()),
]


class StoreHeader(BaseModel):
    """What the schema metadata of every shard says."""

    model_config = ConfigDict(frozen=True)

    codec_version: int = CODEC_VERSION
    estimator: EstimatorName
    parameters: dict[str, int]
    layout: Layout
    temperature: float = 1.0
    vocab_size: int
    teacher: str
    tokenizer: str


@dataclass(frozen=True)
class SoftLabelSequence:
    """The soft labels of one sequence.

    ``token_ids`` int32 (T,); ``offsets`` int64 (T+1,): the entries of position t, the distribution
    of the token after token t, are [offsets[t], offsets[t+1]), none where t is not labelled;
    ``ids`` int32 and ``weights`` float32 (nnz,). ``p`` (nnz,) is the teacher's own probability
    of each id, 0 where the estimator does not store it, and ``draws`` (nnz,) the number of draws
    that hit it. ``labelled`` int32 (L,) positions; ``entropy`` and ``head_mass`` float32 (L,).
    """

    document_id: str
    digest: str
    token_ids: npt.NDArray[np.int32]
    labelled: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    p: npt.NDArray[np.float32]
    draws: npt.NDArray[np.int64]
    entropy: npt.NDArray[np.float32]
    head_mass: npt.NDArray[np.float32]


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"labels-{index:05d}.parquet"


def write_shard(
    path: Path, header: StoreHeader, sequences: Sequence[TokenSequence], entries: list[Entries]
) -> None:
    """Write one shard by an atomic rename; equal input gives equal bytes."""
    metadata = {b"seodang": header.model_dump_json().encode()}
    columns: dict[str, list[Any]] = {
        "sequence_digest": [s.digest for s in sequences],
        "document_id": [s.document_id for s in sequences],
        "token_ids": [s.token_ids for s in sequences],
        "labelled": [s.labelled for s in sequences],
        "entropy": [e.entropy for e in entries],
        "head_mass": [e.head_mass for e in entries],
        "record": [encode(e, header.estimator, header.vocab_size) for e in entries],
    }
    table = pa.table(columns, schema=pa.schema(_COLUMNS, metadata=metadata))
    leaves = [n + (".list.element" if pa.types.is_list(t) else "") for n, t in _COLUMNS]
    compression = dict.fromkeys(leaves, "ZSTD")
    if header.layout == "fast":
        compression["record"] = "NONE"
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(
        table,
        temporary,
        compression=compression,
        compression_level={name: 9 for name in leaves if compression[name] == "ZSTD"},
        use_dictionary=["document_id"],
        column_encoding={
            "entropy.list.element": "BYTE_STREAM_SPLIT",
            "head_mass.list.element": "BYTE_STREAM_SPLIT",
            "labelled.list.element": "DELTA_BINARY_PACKED",
        },
        write_statistics=False,
    )
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class SoftLabelStore:
    """An open store: ``len``, iteration and indexing by sequence."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.path = artifact.path
        self._shards = sorted(self.path.glob("labels-*.parquet"))
        if not self._shards:
            raise InputError(f"{self.path}: a soft-label store without a shard")
        self.header = _read_header(self._shards[0])
        rows = []
        for shard in self._shards:
            with readable(shard):
                rows.append(pq.read_metadata(shard).num_rows)
        self._first = np.concatenate([[0], np.cumsum(rows)])
        self._read = lru_cache(maxsize=4)(self._read_shard)

    @property
    def vocab_size(self) -> int:
        """Number of ids of the teacher's output."""
        return self.header.vocab_size

    @property
    def estimator(self) -> EstimatorName:
        """Standard name of the estimator."""
        return self.header.estimator

    @property
    def num_tokens(self) -> int:
        """Number of labelled tokens."""
        return int(self.artifact.manifest.summary["tokens"])

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all files of the store over labelled tokens."""
        size = sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())
        return size / max(1, self.num_tokens)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> SoftLabelSequence:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._sequence(shard, index - int(self._first[shard]))

    def __iter__(self) -> Iterator[SoftLabelSequence]:
        return (self[i] for i in range(len(self)))

    def _read_shard(self, shard: int) -> pa.Table:
        with readable(self._shards[shard]):
            table = pq.read_table(self._shards[shard], memory_map=True)
        if _read_header(self._shards[shard]) != self.header:
            raise InputError(f"{self._shards[shard]}: made with other settings than shard 0")
        return table

    def _sequence(self, shard: int, row: int) -> SoftLabelSequence:
        table = self._read(shard)

        def values(name: str) -> Any:
            return table.column(name)[row].values.to_numpy(zero_copy_only=False)

        header = self.header
        try:
            token_ids, labelled = values("token_ids"), values("labelled")
            entries = decode(
                table.column("record")[row].as_py(),
                len(labelled),
                values("head_mass"),
                values("entropy"),
                header.estimator,
                header.vocab_size,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self._shards[shard]}: row {row}: {error}") from None
        per_position = np.zeros(len(token_ids), np.int64)
        per_position[labelled] = entries.counts
        return SoftLabelSequence(
            document_id=table.column("document_id")[row].as_py(),
            digest=table.column("sequence_digest")[row].as_py(),
            token_ids=token_ids,
            labelled=labelled,
            offsets=np.concatenate([[0], np.cumsum(per_position)]),
            ids=entries.ids,
            weights=weights(
                header.estimator,
                header.parameters,
                entries.counts,
                entries.p,
                entries.draws,
                entries.head_mass,
            ),
            p=entries.p,
            draws=entries.draws,
            entropy=entries.entropy,
            head_mass=entries.head_mass,
        )

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise ``InputError`` if the labels were made with another tokenizer."""
        if fingerprint != self.header.tokenizer:
            raise InputError(
                f"{self.path}: these soft labels were made with another tokenizer "
                f"(sha256 {self.header.tokenizer[:12]}, the student's is {fingerprint[:12]}): "
                "capture again with this one, or use a student that shares the teacher's"
            )

    def verify(self) -> list[str]:
        """Every fault of the store, as readable lines: files, tokens, ids and weights."""
        problems = self.artifact.verify()
        if problems:
            return problems
        tokens = 0
        for number, sequence in enumerate(self):
            where = f"sequence {number} of document {sequence.document_id}"
            tokens += len(sequence.labelled)
            if problem := check_tokens(sequence):
                problems.append(f"{where}: {problem}")
            if len(sequence.ids) and not 0 <= sequence.ids.min() <= sequence.ids.max() < (
                self.vocab_size
            ):
                problems.append(f"{where}: an id outside the vocabulary of {self.vocab_size}")
            if not (np.isfinite(sequence.weights).all() and (sequence.weights >= 0).all()):
                problems.append(f"{where}: a weight that is negative or not finite")
        if tokens != self.num_tokens:
            problems.append(f"{tokens} labelled tokens, the manifest says {self.num_tokens}")
        return problems


def check_tokens(sequence: SoftLabelSequence) -> str | None:
    """What is wrong if a record's tokens or positions are not those that were labelled."""
    tokens = TokenSequence(sequence.document_id, sequence.token_ids, sequence.labelled)
    if tokens.digest != sequence.digest:
        return (
            f"tokens or labelled positions have the digest {tokens.digest[:12]}, "
            f"the labels belong to {sequence.digest[:12]}"
        )
    return None


@contextmanager
def readable(shard: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into an ``InputError`` that names it."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{shard}: cannot be read: {reason}") from None


def _read_header(shard: Path) -> StoreHeader:
    with readable(shard):
        metadata = pq.read_schema(shard).metadata or {}
    try:
        raw = json.loads(metadata[b"seodang"])
        if raw.get("codec_version", 0) > CODEC_VERSION:
            raise InputError(f"{shard}: codec version {raw['codec_version']}: newer than this one")
        return StoreHeader.model_validate(raw)
    except (KeyError, ValueError, ValidationError):
        raise InputError(f"{shard}: not a shard of a soft-label store") from None


def open(path: Path | str) -> SoftLabelStore:
    """Open a finished store; raises ``InputError`` if it is unfinished or of another kind."""
    return SoftLabelStore(Artifact.open(path, "soft-labels"))
