"""The store: an artifact of Parquet shards, read by sequence.

See :mod:`seodang.softlabels.shards` for what a shard holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seodang.artifact import Artifact
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError
from seodang.recipe import EstimatorName
from seodang.softlabels.shards import Shard, read_header

OPEN_SHARDS = {"fast": 1024, "small": 8}  # whose index, or whose token ids, are kept in memory


@dataclass(slots=True)
class SoftLabelSequence:
    """The soft labels of one sequence.

    ``token_ids`` int32 (T,); ``labelled`` int32 (L,) positions; ``offsets`` int64 (T+1,): the
    entries of position t, the distribution of the token after token t, are [offsets[t],
    offsets[t+1]), none where t is not labelled; ``ids`` int32 and ``weights`` float32 (nnz,), of
    a position in no particular order.
    """

    token_ids: npt.NDArray[np.int32]
    labelled: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    _shard: Shard
    _row: int

    @property
    def document_id(self) -> str:
        """The document that the sequence is a part of."""
        return self._shard.document_id(self._row)

    @property
    def digest(self) -> str:
        """Content digest of the tokens and positions that the labels were made for."""
        return self._shard.sequence_digest(self._row)

    @property
    def entropy(self) -> npt.NDArray[np.float32]:
        """The teacher's entropy in nats, (L,), rounded to 1/8."""
        return self._shard.column("entropy", self._row)

    @property
    def head_mass(self) -> npt.NDArray[np.float32]:
        """The teacher's probability of all exact entries, (L,), rounded to 1/15."""
        return self._shard.column("head_mass", self._row)


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"labels-{index:05d}.parquet"


class SoftLabelStore:
    """An open store: ``len``, iteration and indexing by sequence.

    Opening reads the manifest and one shard's metadata; a shard is opened when it is needed.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.path = artifact.path
        try:
            rows = [int(count) for count in artifact.manifest.summary["rows"]]
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{self.path}: a soft-label store without a shard") from None
        self._first = np.concatenate([[0], np.cumsum(rows)])
        self._shards = [self.path / shard_name(index) for index in range(len(rows))]
        if not self._shards:
            raise InputError(f"{self.path}: a soft-label store without a shard")
        self.header = read_header(self._shards[0])
        self._weights = self.header.levels().astype(np.float32)
        self._open = lru_cache(maxsize=OPEN_SHARDS[self.header.layout])(self._open_shard)

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

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of every sequence, without reading their labels."""
        shards = map(self._open, range(len(self._shards)))
        return np.concatenate([shard.tokens for shard in shards]).astype(np.int64)

    @cached_property
    def labelled_counts(self) -> npt.NDArray[np.int64]:
        """Number of labelled tokens of every sequence, without reading their labels."""
        shards = map(self._open, range(len(self._shards)))
        return np.concatenate([np.diff(shard.labelled_start) for shard in shards])

    @cached_property
    def document_ids(self) -> list[str]:
        """The document of every sequence, without reading its labels."""
        shards = map(self._open, range(len(self._shards)))
        return [shard.document_id(row) for shard in shards for row in range(len(shard))]

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> SoftLabelSequence:
        """A sequence, checked against its checksum; raises ``InputError`` if it is damaged."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        number = int(self._first.searchsorted(index, side="right")) - 1
        shard, row = self._open(number), index - int(self._first[number])
        token_ids, labelled, counts, ids, codes = shard.row(row)
        offsets = np.zeros(len(token_ids) + 1, np.int64)
        if len(labelled) == len(token_ids):
            np.cumsum(counts, out=offsets[1:])
        else:
            offsets[1:][labelled] = counts
            np.cumsum(offsets, out=offsets)
        return SoftLabelSequence(
            token_ids, labelled, offsets, ids, self._weights.take(codes), shard, row
        )

    def __iter__(self) -> Iterator[SoftLabelSequence]:
        return (self[i] for i in range(len(self)))

    def _open_shard(self, number: int) -> Shard:
        shard = Shard(self._shards[number], self.header)
        if len(shard) != self._first[number + 1] - self._first[number]:
            raise InputError(
                f"{shard.path}: {len(shard)} sequences, the manifest says "
                f"{self._first[number + 1] - self._first[number]}"
            )
        return shard

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
            finite = np.isfinite(sequence.entropy).all() and (sequence.entropy >= 0).all()
            if not (finite and np.isfinite(sequence.head_mass).all()):
                problems.append(f"{where}: an entropy or head mass that is not finite")
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


def open(path: Path | str) -> SoftLabelStore:
    """Open a finished store; raises ``InputError`` if it is unfinished or of another kind."""
    return SoftLabelStore(Artifact.open(path, "soft-labels"))
