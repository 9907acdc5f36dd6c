"""Which documents are held out, and the two sides of the finished corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter

from seodang.artifact import sha256_bytes
from seodang.corpus.raw.config import DeduplicationConfig
from seodang.corpus.raw.overlap import HeldOutIndex
from seodang.corpus.raw.reading import COLUMNS, Side
from seodang.corpus.raw.shards import TEXT_COLUMNS, read_shards


def side_of(key: str, held_out: float) -> Side:
    """The side of the document that ``key`` names: it depends on nothing but the two arguments."""
    draw = int.from_bytes(hashlib.sha256(b"held-out:" + key.encode()).digest()[:8]) / 2**64
    return "held-out" if draw < held_out else "train"


class WriteSides(PipelineStep):  # type: ignore[misc]
    """Writes the documents whose ids are in the range of this task, in the order of their ids.

    The ids are digests, so that is a random order. All pieces of a document are on one side. A
    training document that repeats a held-out one is dropped (``deduplication.held_out_overlap``).
    """

    type = "💽 - WRITER"
    name = "held-out"

    def __init__(
        self,
        unique: Path,
        out: Path,
        exclusion_writer: DiskWriter,
        held_out: float,
        config: DeduplicationConfig,
    ) -> None:
        super().__init__()
        self.unique = unique
        self.out = out
        self.exclusion_writer = exclusion_writer
        self.held_out = held_out
        self.config = config

    def run(
        self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        """Write both sides of range ``rank`` of ``world_size``."""
        index = HeldOutIndex(self.config.ngram, self.config.held_out_overlap)
        sides: dict[Side, list[dict[str, str]]] = {"train": [], "held-out": []}
        for row in read_shards(self.unique):
            row["id"] = sha256_bytes(row["text"].encode())[:16]
            side = side_of(row["key"], self.held_out)
            if side == "held-out":
                index.add(row["text"])
            if int(row["id"], 16) * world_size >> 64 == rank:
                sides[side].append(row)
        kept = []
        with self.exclusion_writer as dropped:
            for row in sides["train"]:
                if index.repeats(row["text"]):
                    metadata = {name: row[name] for name in TEXT_COLUMNS[2:]}
                    dropped.write(Document(row["text"], row["id"], metadata=metadata), rank)
                else:
                    kept.append(row)
        schema = pa.schema([(name, pa.string()) for name in COLUMNS])
        for side, rows in (("train", kept), ("held-out", sides["held-out"])):
            (self.out / side).mkdir(exist_ok=True)
            table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["id"]), schema)
            pq.write_table(table, self.out / side / f"{rank:05d}.parquet", compression="zstd")
