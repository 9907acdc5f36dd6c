"""One shard of a store: a Parquet file, one row per sequence.

Readable columns for any Parquet reader, and one binary column with the packed records. What a
record means (codec version, estimator and its parameters, temperature, vocabulary, fingerprints
of teacher and tokenizer) stands in the schema metadata under ``seodang``.

In the layout `fast` token ids and records are written as one plain, uncompressed page each, whose
last bytes are the values one after the other: they are read where they lie, through a memory map,
without decoding the file. Every row has a checksum of both, which is compared when it is read;
a seal (:mod:`seodang.softlabels.seal`) covers the rest of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError
from xxhash import xxh3_64_intdigest

from seodang.artifact import write_atomically
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError
from seodang.recipe import EstimatorName, Layout
from seodang.softlabels.entropy_coding import (
    EntropyModel,
    frequent_ids,
    ids_from_text,
    ids_to_text,
    rank_ids,
    symbols,
)
from seodang.softlabels.estimators import Entries, Parameters
from seodang.softlabels.planes import Planes
from seodang.softlabels.quantisation import levels, nearest_codes
from seodang.softlabels.seal import check_body, only_page, open_footer, sealed

CODEC_VERSION = 1
ENTROPY_STEP = 1 / 8  # nats; to which the column is rounded
HEAD_MASS_STEP = 1 / 15  # 16 values: half a byte
LARGEST_VOCABULARY = 1 << 24  # of both layouts


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("sequence_digest", pa.string()),
            ("document_id", pa.string()),
            ("tokens", pa.int32()),
            ("entries", pa.int32()),
            ("token_ids", _list_of(pa.int32())),
            ("labelled", _list_of(pa.int32())),
            ("entropy", _list_of(pa.float32())),
            ("head_mass", _list_of(pa.float32())),
            ("record", pa.binary()),
            ("checksum", pa.uint64()),
        )
    ]
)
_FLOATS = ("entropy", "head_mass")  # read when they are asked for
_PLAIN = {"fast": ("token_ids.list.element", "record"), "small": ("record",)}
_READ_IN_PLACE: dict[Layout, tuple[str, ...]] = {"fast": _PLAIN["fast"], "small": ()}


class StoreHeader(BaseModel):
    """What the schema metadata of every shard says."""

    model_config = ConfigDict(frozen=True)

    codec_version: int = CODEC_VERSION
    estimator: EstimatorName
    parameters: Parameters
    layout: Layout
    temperature: float = 1.0
    vocab_size: int
    teacher: str
    tokenizer: str

    def levels(self) -> npt.NDArray[np.float64]:
        """The weights that a record can hold, by code."""
        return levels(self.estimator, self.parameters)


def shard_bytes(
    header: StoreHeader,
    sequences: Sequence[TokenSequence],
    entries: Sequence[Entries],
    skipped: Sequence[dict[str, Any]] = (),
) -> bytes:
    """The file of one shard; equal input gives equal bytes.

    ``skipped`` says which documents were left out and why; it is kept in the metadata.

    Raises ``InputError`` for a vocabulary beyond 2^24.
    """
    if header.vocab_size > LARGEST_VOCABULARY:
        raise InputError(f"a vocabulary of {header.vocab_size} ids is beyond the record's 2^24")
    metadata = {"seodang": header.model_dump_json()}
    if skipped:
        metadata["seodang.skipped"] = json.dumps(list(skipped))
    entropy = [_rounded(e.entropy, ENTROPY_STEP) for e in entries]
    token_ids = [s.token_ids.astype("<i4") for s in sequences]
    codes = [nearest_codes(e.weights, header.levels()) for e in entries]
    if header.layout == "fast":
        planes = Planes(header.vocab_size, len(header.levels()))
        records = [planes.encode(e.counts, e.ids, c) for e, c in zip(entries, codes, strict=True)]
    else:
        nothing = np.empty(0, np.int32)
        frequent = frequent_ids(np.concatenate([nothing, *(e.ids for e in entries)]))
        every_token = np.concatenate([nothing, *token_ids])
        ranks, _ = rank_ids(frequent, every_token, header.vocab_size)
        coded = [
            symbols(e.counts, ranks[e.ids], c, h)
            for e, c, h in zip(entries, codes, entropy, strict=True)
        ]
        model = EntropyModel.fit(coded, len(header.levels()))
        metadata["seodang.frequencies"] = model.to_text()
        metadata["seodang.frequent"] = ids_to_text(frequent)
        records = [model.encode(sequence) for sequence in coded]
    columns: dict[str, list[Any]] = {
        "sequence_digest": [s.digest for s in sequences],
        "document_id": [s.document_id for s in sequences],
        "tokens": [len(ids) for ids in token_ids],
        "entries": [len(e.ids) for e in entries],
        "token_ids": token_ids,
        "labelled": [s.labelled for s in sequences],
        "entropy": entropy,
        "head_mass": [_rounded(e.head_mass, HEAD_MASS_STEP) for e in entries],
        "record": records,
        "checksum": [checksum(t, r) for t, r in zip(token_ids, records, strict=True)],
    }
    table = pa.table(columns, schema=SCHEMA)
    leaves = [f.name + (".list.element" if pa.types.is_list(f.type) else "") for f in SCHEMA]
    plain = _PLAIN[header.layout]
    file = pa.BufferOutputStream()
    with pq.ParquetWriter(
        file,
        SCHEMA,
        compression={leaf: "NONE" if leaf in plain else "ZSTD" for leaf in leaves},
        compression_level={leaf: 9 for leaf in leaves if leaf not in plain},
        use_dictionary=["document_id", "entropy.list.element", "head_mass.list.element"],
        column_encoding={"labelled.list.element": "DELTA_BINARY_PACKED"},
        data_page_size=1 << 30,
        max_rows_per_page=max(1, len(sequences)),
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        writer.write_table(table, row_group_size=max(1, len(sequences)))
        writer.add_key_value_metadata(metadata)
    return sealed(file.getvalue(), _READ_IN_PLACE[header.layout])


def write_shard(
    path: Path, header: StoreHeader, sequences: Sequence[TokenSequence], entries: Sequence[Entries]
) -> None:
    """Write one shard by an atomic rename."""
    write_atomically(path, shard_bytes(header, sequences, entries))


def checksum(token_ids: Any, record: Any) -> int:
    """XXH3, 64 bits, of a row's token ids and record: arrays or bytes."""
    return int(xxh3_64_intdigest(record, xxh3_64_intdigest(token_ids)))


def _rounded(values: npt.NDArray[np.float32], step: float) -> npt.NDArray[np.float32]:
    rounded: npt.NDArray[np.float32] = (np.rint(values / step) * step).astype(np.float32)
    return rounded


class Shard:
    """An open shard: where its rows lie, and the columns that are small."""

    def __init__(self, path: Path, header: StoreHeader) -> None:
        self.path = path
        self.header = header
        with readable(path):
            self._bytes = np.memmap(path, np.uint8, "r")
            footer = open_footer(path, self._bytes)
            own, metadata = _header(path, footer.metadata)
            if own != header:
                raise InputError(f"{path}: made with other settings than shard 0")
            check_body(self._bytes, footer, _READ_IN_PLACE[header.layout])
            file = pq.ParquetFile(path, metadata=footer, memory_map=True)
            elsewhere = {*_FLOATS, *(("token_ids", "record") if header.layout == "fast" else ())}
            table = file.read([n for n in SCHEMA.names if n not in elsewhere]).combine_chunks()
            self._names = table.select(["document_id", "sequence_digest"])
            self.tokens = _values(table["tokens"])
            self.token_start = _starts(self.tokens)
            self._labelled, self.labelled_start = _list_values(table["labelled"])
            self._checksums = _values(table["checksum"])
            counts = np.diff(self.labelled_start)
            self._everything = bool((self.tokens == counts).all())
            if self._everything:  # one range serves all rows
                within = np.arange(self.token_start[-1]) - np.repeat(self.token_start[:-1], counts)
                if (within != self._labelled).any():
                    raise ValueError("the labelled positions are not those of the tokens")
                self._labelled = np.arange(self.tokens.max(initial=0), dtype=np.int32)
            if header.layout == "fast":
                self._planes = Planes(header.vocab_size, len(header.levels()))
                sizes = self._planes.entry_bytes * _values(table["entries"]) + 2 * counts
                token_bytes = 4 * int(self.token_start[-1])
                self._token_ids = self._page_end(footer, 0, token_bytes).view("<i4")
                self._records = self._page_end(footer, 1, int(sizes.sum()) + 4 * len(sizes))
                self.record_start = _starts(sizes + 4) + 4  # each value has its length before it
                self.record_stop = self.record_start[:-1] + sizes
            else:
                self._token_ids, _ = _list_values(table["token_ids"])
                column = table["record"].chunk(0) if len(table) else pa.array([], pa.binary())
                _, offsets, values = column.buffers()
                ends = np.frombuffer(offsets, np.int32, len(column) + 1, 4 * column.offset)
                record_ends = ends.astype(np.int64)
                self._records = np.frombuffer(values, np.uint8)
                self.record_start, self.record_stop = record_ends, record_ends[1:]
                self._model = EntropyModel.from_text(
                    metadata[b"seodang.frequencies"].decode(), len(header.levels())
                )
                frequent = ids_from_text(metadata[b"seodang.frequent"].decode())
                self._id_of_rank = rank_ids(frequent, self._token_ids, header.vocab_size)[1]

    def __len__(self) -> int:
        return len(self.tokens)

    def document_id(self, row: int) -> str:
        """The document of a row."""
        return str(self._names["document_id"][row].as_py())

    def sequence_digest(self, row: int) -> str:
        """The content digest that the row's labels belong to."""
        return str(self._names["sequence_digest"][row].as_py())

    def row(
        self, row: int
    ) -> tuple[
        npt.NDArray[np.int32],
        npt.NDArray[np.int32],
        npt.NDArray[Any],
        npt.NDArray[np.int32],
        npt.NDArray[np.uint8],
    ]:
        """Token ids, labelled positions, and counts, ids and codes of a row's entries.

        Raises ``InputError`` if the row is not what was written.
        """
        token_ids = self._token_ids[self.token_start[row] : self.token_start[row + 1]]
        record = self._records[self.record_start[row] : self.record_stop[row]]
        if checksum(token_ids, record) != self._checksums[row]:
            raise InputError(
                f"{self.path}: row {row}: damaged, its checksum differs; `seodang labels verify` "
                "says what else is, and capturing again makes this shard anew"
            )
        if self._everything:
            labelled = self._labelled[: len(token_ids)]
        else:
            labelled = self._labelled[self.labelled_start[row] : self.labelled_start[row + 1]]
        try:
            if self.header.layout == "fast":
                return (token_ids, labelled, *self._planes.decode(record, len(labelled)))
            counts, ranks, codes = self._model.decode(record, self.column("entropy", row))
            return token_ids, labelled, counts, self._id_of_rank[ranks], codes
        except (ValueError, IndexError, AssertionError) as error:
            raise InputError(f"{self.path}: row {row}: {error}") from None

    def column(self, name: str, row: int) -> npt.NDArray[np.float32]:
        """The row's part of ``entropy`` or ``head_mass``."""
        values: npt.NDArray[np.float32] = self._floats[name]
        return values[self.labelled_start[row] : self.labelled_start[row + 1]]

    @cached_property
    def _floats(self) -> dict[str, npt.NDArray[np.float32]]:
        with readable(self.path):
            table = pq.read_table(
                self.path, columns=list(_FLOATS), memory_map=True, page_checksum_verification=True
            )
        return {name: _list_values(table[name])[0] for name in _FLOATS}

    def _page_end(self, footer: pq.FileMetaData, column: int, size: int) -> npt.NDArray[np.uint8]:
        """The last ``size`` bytes of the page of a column that is read in place: its values."""
        if not size:
            return np.empty(0, np.uint8)
        page = only_page(footer, _READ_IN_PLACE["fast"][column])
        if size > page.stop - page.start:
            raise ValueError("a page is shorter than its rows say")
        return self._bytes[page.stop - size : page.stop].view(np.ndarray)


def _starts(sizes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _whole(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    return array


def _values(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """The values of a column of numbers; `to_numpy` would import pandas (40 MB) where it is."""
    return np.from_dlpack(_whole(column))


def _list_values(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The values of a list column, and where each row's begin (one more than rows)."""
    array = _whole(column)
    return np.from_dlpack(array.flatten()), np.from_dlpack(array.offsets).astype(np.int64)


@contextmanager
def readable(shard: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into an ``InputError`` that names it."""
    try:
        yield
    except (OSError, pa.ArrowException, KeyError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{shard}: cannot be read: {reason}") from None


def read_footer(shard: Path) -> pq.FileMetaData:
    """The footer of a shard; raises ``InputError`` if it is not as it was written."""
    with readable(shard):
        return open_footer(shard, np.memmap(shard, np.uint8, "r"))


def read_header(shard: Path) -> StoreHeader:
    """The header in a shard's metadata; raises ``InputError`` if there is none."""
    return _header(shard, read_footer(shard).metadata)[0]


def read_skipped(shard: Path) -> list[dict[str, Any]]:
    """The documents that a shard left out, and why."""
    metadata = read_footer(shard).metadata or {}
    found: list[dict[str, Any]] = json.loads(metadata.get(b"seodang.skipped", b"[]"))
    return found


def _header(
    shard: Path, metadata: dict[bytes, bytes] | None
) -> tuple[StoreHeader, dict[bytes, bytes]]:
    metadata = metadata or {}
    try:
        raw = json.loads(metadata[b"seodang"])
        if raw.get("codec_version", 0) > CODEC_VERSION:
            raise InputError(f"{shard}: codec version {raw['codec_version']}: newer than this one")
        return StoreHeader.model_validate(raw), metadata
    except (KeyError, ValueError, ValidationError):
        raise InputError(f"{shard}: not a shard of a soft-label store") from None
