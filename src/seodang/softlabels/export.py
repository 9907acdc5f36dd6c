"""Labels out of a store: as plain Parquet that needs no decoding, or some of them as a store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from seodang.artifact import Artifact, Source, begin, sha256_bytes, write_atomically
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError
from seodang.progress import track
from seodang.softlabels.card import CARD, data_card
from seodang.softlabels.estimators import Entries
from seodang.softlabels.observed import entry_counts
from seodang.softlabels.shards import write_shard
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore, shard_name

GROUP_ENTRIES = 1 << 20  # of a row group or shard: some tens of megabytes of memory
_SUMMARISED = {"estimator", "parameters", "layout", "vocab_size"}

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


def export_documents(
    store: SoftLabelStore,
    documents: Set[str],
    out: Path,
    *,
    sources: Iterable[Source] = (),
    notes: Iterable[str] = (),
) -> Artifact:
    """The labels of these ``documents`` (ids) as a store of its own in ``out``.

    It holds what ``store`` holds for them, and is read, verified and trained from like any other.
    ``sources`` and ``notes`` are for its card. Equal input gives equal bytes.

    Raises ``InputError`` if ``store`` has no label of any of them.
    """
    sequences = [sequence for sequence in store if sequence.document_id in documents]
    if not sequences:
        raise InputError(f"{store.path}: holds no label of these documents")
    parent, sources = store.artifact, list(sources)
    digests = "\n".join(sequence.digest for sequence in sequences)
    inputs = {**parent.manifest.inputs, "store": parent.digest}
    inputs["sequences"] = sha256_bytes(digests.encode())
    draft = begin(out, "soft-labels", parent.manifest.config, inputs)
    if isinstance(draft, Artifact):
        return draft
    size = 0
    rows: list[int] = []
    for group in _groups(sequences):
        tokens = [TokenSequence(s.document_id, s.token_ids, s.labelled) for s in group]
        file = draft.path / shard_name(len(rows))
        write_shard(file, store.header, tokens, [_entries(sequence) for sequence in group])
        size += file.stat().st_size
        rows.append(len(group))
    summary = {
        **store.header.model_dump(include=_SUMMARISED),
        "tokens": sum(len(sequence.labelled) for sequence in sequences),
        "sequences": len(sequences),
        "record_bytes": size,
        "rows": rows,
    }
    card = data_card(store.header, summary, sources, list(notes))
    write_atomically(draft.path / CARD, card.encode())
    return draft.finish(sources=sources, summary=summary)


def _entries(sequence: SoftLabelSequence) -> Entries:
    return Entries(
        counts=entry_counts(sequence),
        ids=sequence.ids,
        weights=sequence.weights.astype(np.float64),
        head_mass=sequence.head_mass,
        entropy=sequence.entropy,
    )


def _groups(sequences: Iterable[SoftLabelSequence]) -> Iterator[list[SoftLabelSequence]]:
    group: list[SoftLabelSequence] = []
    entries = 0
    for sequence in sequences:
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
