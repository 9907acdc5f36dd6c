"""Reading a finished raw corpus.

for document in read_raw(Path("runs/nano/raw-corpus"), "train"):
    print(document.language, document.license, document.text[:60])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seodang.artifact import Artifact

KIND = "raw-corpus"
Side = Literal["train", "held-out"]
Language = Literal["ko", "en", "code"]
COLUMNS = ("id", "text", "source", "license", "language", "origin")


@dataclass(frozen=True, slots=True)
class RawDocument:
    """A document of raw text, with where it came from and what may be done with it.

    ``id`` is 16 hex digits of the text's SHA-256; ``license`` an SPDX expression; ``language``
    ``ko``, ``en`` or ``code``; ``origin`` the package and the file in it, as on a card.
    """

    id: str
    text: str
    source: str
    license: str
    language: Language
    origin: str


def read_raw(path: Path | str, side: Side) -> Iterator[RawDocument]:
    """The documents of one side of a raw corpus, in an order that is always the same.

    Raises ``InputError`` if ``path`` holds no finished raw corpus, ``ValueError`` for a side that
    is neither ``train`` nor ``held-out``.
    """
    if side not in ("train", "held-out"):
        raise ValueError(f"side must be train or held-out, not {side!r}")
    artifact = Artifact.open(path, KIND)
    return _documents(artifact, side)


def count_raw(path: Path | str, side: Side) -> int:
    """How many documents :func:`read_raw` gives, without reading them."""
    import pyarrow.parquet as pq

    files = _files(Artifact.open(path, KIND), side)
    return sum(int(pq.read_metadata(file).num_rows) for file in files)


def _documents(artifact: Artifact, side: Side) -> Iterator[RawDocument]:
    import pyarrow.parquet as pq

    for path in _files(artifact, side):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=list(COLUMNS)):
                for row in batch.to_pylist():
                    yield RawDocument(**row)


def _files(artifact: Artifact, side: Side) -> list[Path]:
    return [
        artifact.path / entry.path
        for entry in artifact.manifest.files
        if entry.path.startswith(f"{side}/") and entry.path.endswith(".parquet")
    ]
