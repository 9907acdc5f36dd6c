"""Labels out of a store, as plain Parquet that needs no decoding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from seodang.errors import InputError
from seodang.progress import track
from seodang.softlabels.observed import entry_counts
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore

GROUP_ENTRIES = 1 << 20  # of a row group: some tens of megabytes of memory

_SCHEMA = pa.schema(
    [
        ("document_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("labelled", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.list_(pa.int32()))),
        ("weights", pa.list_(pa.list_(pa.float32()))),
        ("entropy", pa.list_(pa.float32())),
        ("head_mass", pa.list_(pa.float32())),
    ]
)


def export(store: SoftLabelStore, out: Path) -> None:
    """Write a store as one Parquet file of lists, a row per sequence.

    ``ids[i]`` and ``weights[i]`` are the entries of position ``labelled[i]``: the distribution of
    the token after it. The file appears by an atomic rename when it is whole. Its metadata has
    the store's header under ``seodang``. Memory holds one row group at a time.

    Raises ``InputError`` for a file inside of the store, which would no longer verify.
    """
    if store.path.resolve() in out.resolve().parents:
        raise InputError(f"{out}: lies inside of the store; choose another place")
    if out.is_dir():
        raise InputError(f"{out}: is a directory; name a file")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such directory")
    schema = _SCHEMA.with_metadata({b"seodang": store.header.model_dump_json().encode()})
    temporary = out.with_name(out.name + ".tmp")
    try:
        with (
            temporary.open("wb") as file,
            pq.ParquetWriter(file, schema, compression="ZSTD", write_statistics=False) as writer,
            track("Exporting soft labels", store.num_tokens, "tok") as advance,
        ):
            for group in _groups(store):
                writer.write_table(_table(group, schema))
                advance(sum(len(sequence.labelled) for sequence in group))
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _groups(store: SoftLabelStore) -> Iterator[list[SoftLabelSequence]]:
    group: list[SoftLabelSequence] = []
    entries = 0
    for sequence in store:
        group.append(sequence)
        entries += len(sequence.ids) + len(sequence.token_ids)
        if entries >= GROUP_ENTRIES:
            yield group
            group, entries = [], 0
    if group:
        yield group


def _table(group: list[SoftLabelSequence], schema: pa.Schema) -> pa.Table:
    counts = [entry_counts(sequence) for sequence in group]
    per_sequence, per_position = [len(c) for c in counts], np.concatenate(counts)

    def column(name: str) -> pa.Array:
        values = [getattr(sequence, name) for sequence in group]
        if name == "document_id":
            return pa.array(values)
        flat = pa.array(np.concatenate(values))
        if name in ("ids", "weights"):
            return _lists(per_sequence, _lists(per_position, flat))
        return _lists([len(value) for value in values], flat)

    return pa.table([column(name) for name in schema.names], schema=schema)


def _lists(lengths: npt.ArrayLike, values: pa.Array) -> pa.Array:
    """Consecutive lists of the given lengths."""
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
