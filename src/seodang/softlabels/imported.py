"""Labels from other programs' files: their records, and what is checked before they are used."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from seodang.corpus.formats import File, Record, read_records
from seodang.errors import InputError

LINE_BYTES = 1 << 30  # of a line of JSON, at most
SUM_TOLERANCE = 1e-3  # above 1, for the sum of a position's probabilities
RENORMALISED = 1e-4  # how close to 1 the sums of renormalised positions are
_SIGNIFICANT = 4.0  # standard deviations by which a wrong alignment must fit better


@dataclass(frozen=True)
class Labelled:
    """The label of one ``position``, the distribution of the token after it."""

    position: int
    ids: list[int]
    log_probs: list[float]


@dataclass(frozen=True)
class ImportedSequence:
    """A sequence as a file gives it; ``where`` it stands, for errors."""

    where: str
    document_id: str
    token_ids: list[int]
    labels: list[Labelled]


def records(path: Path) -> Iterator[Record]:
    """The rows of a Parquet or JSONL file, as objects.

    Raises ``InputError`` for another extension and for a file that cannot be read.
    """
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        for record in read_records(
            File(path.name, str(path), lambda: path.open("rb")), None, LINE_BYTES
        ):
            if not isinstance(record.value, dict):
                raise InputError(f"{record.where}: a row must be an object with named fields")
            yield record
    elif name.endswith(".parquet"):
        yield from _parquet_rows(path)
    else:
        raise InputError(f"{path}: wants a .parquet or .jsonl file")


def _parquet_rows(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    yield Record(row, f"{path}, row {number}", str(number))
                    number += 1
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read: {reason}") from None


@contextmanager
def as_written_by(program: str, record: Record) -> Iterator[None]:
    """Turn what a value of the wrong kind raises into an ``InputError`` that names its row."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{record.where}: not as {program} writes it: {error}") from None


def document_id(record: Record, path: Path) -> str:
    """The record's own ``id``, else its place in the file."""
    given = record.value.get("id")
    return str(given) if isinstance(given, str | int) else f"{path.name}#{record.position}"


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages with ``role`` and ``content``."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
    )


def numbered(token: object) -> int | None:
    """The id of a token written as ``token_id:NUMBER``, as vLLM's server does when asked to."""
    match = re.fullmatch(r"token_id:(\d+)", str(token))
    return int(match[1]) if match else None


def logarithm(value: object, where: str) -> float:
    """A log-probability of a file; raises ``InputError`` for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {value!r} is no log-probability")
    return float(value)


@dataclass
class Survey:
    """What a whole file holds, gathered before anything is written."""

    vocab_size: int
    sequences: int = 0
    tokens: int = 0
    k: int = 0
    renormalised: bool = True
    hits: list[int] = field(default_factory=lambda: [0, 0, 0])

    def add(self, sequence: ImportedSequence) -> None:
        """Check one sequence and count it.

        Raises ``InputError`` for an id outside of the vocabulary or twice at one position, a
        log-probability that is not finite, lists of unequal length, and probabilities that sum to
        more than 1.
        """
        self.sequences += 1
        self.tokens += len(sequence.labels)
        self._check_ids(sequence.token_ids, sequence.where, "token")
        for label in sequence.labels:
            where = f"{sequence.where}: position {label.position}"
            if not 0 <= label.position < len(sequence.token_ids):
                raise InputError(f"{where}: the sequence has {len(sequence.token_ids)} tokens")
            if len(label.ids) != len(label.log_probs):
                raise InputError(
                    f"{where}: {len(label.ids)} ids and {len(label.log_probs)} log-probabilities"
                )
            self._check_ids(label.ids, where, "id")
            if len(set(label.ids)) != len(label.ids):
                raise InputError(f"{where}: an id stands there twice")
            if not all(map(math.isfinite, label.log_probs)):
                raise InputError(f"{where}: a log-probability is not a finite number")
            total = math.fsum(map(math.exp, (min(x, 1.0) for x in label.log_probs)))
            if total > 1 + SUM_TOLERANCE:
                raise InputError(
                    f"{where}: the probabilities sum to {total:.4f}: these are no natural "
                    "logarithms of probabilities, or not of one distribution"
                )
            self.renormalised &= abs(total - 1) <= RENORMALISED
            self.k = max(self.k, len(label.ids))
            held = set(label.ids)
            for index in range(3):  # the token that the label stands at, the next, the one after
                at = label.position + index
                if at < len(sequence.token_ids):
                    self.hits[index] += sequence.token_ids[at] in held

    def _check_ids(self, ids: list[int], where: str, what: str) -> None:
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise InputError(
                    f"{where}: {what} {token!r} is outside of the vocabulary of {self.vocab_size}: "
                    "the file belongs to another tokenizer"
                )

    def check_alignment(self, path: Path) -> None:
        """Raise ``InputError`` if the labels fit a neighbour of the token that they are for.

        The token that came is among the most likely ones far more often than its neighbours are.
        """
        here, following, later = self.hits
        for hits, what in ((here, "before"), (later, "after")):
            if hits - following > _SIGNIFICANT * math.sqrt(hits + following):
                raise InputError(
                    f"{path}: its labels hold the token {what} the one that they are for more "
                    f"often ({hits:,} times) than that one ({following:,} of {self.tokens:,}): "
                    "the rows are shifted by one, so the file was made with another chat template "
                    "or tokenizer"
                )


def probabilities(label: Labelled, temperature: float) -> np.ndarray:
    """The probabilities at temperature 1, float64, of at most 1 together.

    A renormalised p at temperature T is proportional to p^(1/T), so p^T gives the ratios back.
    """
    weights = np.exp(np.minimum(np.asarray(label.log_probs, np.float64), 0.0) * temperature)
    total = weights.sum()
    return weights / total if temperature != 1 or total > 1 else weights
