"""The files between two steps: Parquet, one per shard, a row per document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.readers.parquet import ParquetReader
from datatrove.pipeline.writers.parquet import ParquetWriter

TEXT_COLUMNS = [
    "text",
    "id",
    "source",
    "license",
    "language",
    "origin",
    "key",
    "encoding",
    "filter_reason",
    "personal_data",
    "personal_samples",
]
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in TEXT_COLUMNS] + [("minhash_cluster_id", pa.int64())]
)


def shard_writer(folder: Path) -> ParquetWriter:
    """Writes the documents of task 7 to ``00007.parquet`` in ``folder``."""
    return ParquetWriter(
        str(folder), adapter=_row, compression="zstd", schema=_SCHEMA, max_file_size=-1
    )


class ShardReader(ParquetReader):  # type: ignore[misc]
    """Reads what ``shard_writer`` wrote: task 7 reads ``00007.parquet``, if there is one.

    datatrove's own reader deals the files out in turn, which moves them between tasks where a
    task had nothing to write.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))

    def run(
        self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield the documents of shard ``rank``, in their order."""
        if self.data_folder.isfile(f"{rank:05d}.parquet"):
            yield from self.read_file(f"{rank:05d}.parquet")


def read_shards(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of all shards in ``folder``, in order; nothing if there is no such folder."""
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()


def _row(writer: ParquetWriter, document: Document) -> dict[str, Any]:
    values = {"text": document.text, "id": document.id, **document.metadata}
    return {name: values.get(name) for name in _SCHEMA.names}
