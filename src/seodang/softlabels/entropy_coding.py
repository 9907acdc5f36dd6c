"""The record of the layout `small`: entropy-coded with the statistics of its shard.

Ids become ranks: first those that are frequent among the shard's entries, which are listed in its
metadata, then all others by how often they occur among its tokens, which a reader has anyway. The
entries of a position are sorted by rank and each rank is told by its distance d to the one before:
its class, floor(log2 d), and the bits below. A range coder
(the library `constriction`, arXiv 2201.01741) packs, for the whole sequence,

1. the number of entries of every position, given the teacher's entropy there,
2. then first entries of all positions, then second ones and so on: the class, given the class of
   the rank before it and how many entries are still to come; the bits below; the weight's code,
   given how many entries came before.

The frequencies of what is coded given what stand in the shard's metadata.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int32]

CLASSES = 26  # floor(log2) of a distance of up to 2^24, and one for "no rank yet"
LEFT = 3  # 1, 2 to 4, or more entries still to come
BEFORE = 4  # 0, 1, 2, or more entries before
ENTROPIES = 24  # half nats
WORTH_LISTING = 6  # occurrences: an id costs about a byte and saves a bit or two each time
COUNTS = 64  # a larger number of entries is told after the symbol 63
_TOTAL = 1 << 10  # of the frequencies of one context


def frequent_ids(ids: Ints) -> Ints:
    """The ids that occur often enough to be worth listing, in classes of falling frequency.

    The classes hold 1, 2, 4, ... ids, each in rising order, so that their distances are small.
    """
    found, occurrences = np.unique(ids, return_counts=True)
    order = np.argsort(-occurrences, kind="stable")
    found = found[order][occurrences[order] >= WORTH_LISTING]
    classes = _log2(np.arange(1, len(found) + 1))
    return found[np.lexsort((found, classes))].astype(np.int32)


def rank_ids(frequent: Ints, token_ids: Ints, vocab_size: int) -> tuple[Ints, Ints]:
    """``frequent`` first, then ids by falling frequency among ``token_ids``, then by id.

    Returns the rank of each id, and the id of each rank, (vocab_size,).
    """
    score = np.bincount(token_ids, minlength=vocab_size)[:vocab_size]
    score[frequent] = np.arange(len(frequent), 0, -1) + len(token_ids)
    id_of_rank = np.argsort(-score, kind="stable").astype(np.int32)
    rank_of_id = np.empty_like(id_of_rank)
    rank_of_id[id_of_rank] = np.arange(vocab_size, dtype=np.int32)
    return rank_of_id, id_of_rank


def ids_to_text(ids: Ints) -> str:
    """A list of ids for the shard's metadata."""
    distances = np.diff(ids, prepend=np.int32(0)).astype("<i4")
    planes = distances.view(np.uint8).reshape(-1, 4).T
    packed = pa.Codec("zstd", 19).compress(np.ascontiguousarray(planes).tobytes(), asbytes=True)
    return f"{len(ids)} {base64.b85encode(packed).decode()}"


def ids_from_text(text: str) -> Ints:
    """The inverse of :func:`ids_to_text`; raises ``ValueError`` for what it did not write."""
    count, _, packed = text.partition(" ")
    planes = np.frombuffer(_unpacked(packed, 4 * int(count)), np.uint8).reshape(4, -1)
    return np.cumsum(np.ascontiguousarray(planes.T).view("<i4")[:, 0], dtype=np.int32)


@dataclass(frozen=True)
class Symbols:
    """What is coded of one sequence, in coding order, with its contexts.

    ``counts`` (positions,); of each entry, layer after layer: ``classes``, ``below`` (the bits
    below the class's) and ``codes``; ``*_context`` index the frequencies.
    """

    counts: Ints
    counts_context: Ints
    classes: Ints
    classes_context: Ints
    below: Ints
    codes: Ints
    codes_context: Ints


def symbols(
    counts: npt.NDArray[np.int64],
    ranks: Ints,
    codes: npt.NDArray[np.uint8],
    entropy: npt.NDArray[np.float32],
) -> Symbols:
    """Sort the entries of each position by rank and say what is coded of them.

    Raises ``ValueError`` if an id is repeated within a position.
    """
    rows = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((ranks, rows))
    ranks, codes = ranks[order], codes[order]
    first = np.cumsum(counts) - counts
    layer = np.arange(len(rows)) - first[rows]
    before = np.where(layer == 0, -1, np.roll(ranks, 1))
    distance = ranks - before
    if (distance <= 0).any():
        raise ValueError("an id is repeated within a position")
    classes = _log2(distance)
    coding = np.lexsort((rows, layer))  # layer after layer
    left = counts[rows] - layer
    return Symbols(
        counts=counts.astype(np.int32),
        counts_context=_entropy_context(entropy),
        classes=classes[coding],
        classes_context=_class_context(before, left)[coding],
        below=(distance - (1 << classes))[coding].astype(np.int32),
        codes=codes[coding].astype(np.int32),
        codes_context=np.minimum(layer, BEFORE - 1)[coding].astype(np.int32),
    )


class EntropyModel:
    """The frequencies of one shard, and the coder that uses them."""

    def __init__(
        self, counts: npt.NDArray[Any], classes: npt.NDArray[Any], codes: npt.NDArray[Any]
    ) -> None:
        self._tables = counts, classes, codes
        # As the coder wants them; a context that never occurred is uniform.
        self.counts, self.classes, self.codes = (
            np.where(table.any(1, keepdims=True), table, 1).astype(np.float32)
            for table in self._tables
        )

    @classmethod
    def fit(cls, sequences: Sequence[Symbols], num_levels: int) -> EntropyModel:
        """Count the symbols of a shard in their contexts."""

        def frequencies(contexts: int, size: int, symbol: str) -> npt.NDArray[np.uint16]:
            table = np.zeros(contexts * size, np.int64)
            for sequence in sequences:
                values = np.minimum(getattr(sequence, symbol), size - 1)
                at = getattr(sequence, f"{symbol}_context") * size + values
                table += np.bincount(at, minlength=contexts * size)
            return _scale(table.reshape(contexts, size))

        return cls(
            frequencies(ENTROPIES, COUNTS, "counts"),
            frequencies(CLASSES * LEFT, CLASSES - 1, "classes"),
            frequencies(BEFORE, num_levels, "codes"),
        )

    def to_text(self) -> str:
        """The frequencies for the shard's metadata."""
        data = b"".join(t.astype("<u2").tobytes() for t in self._tables)
        return base64.b85encode(pa.Codec("zstd", 19).compress(data, asbytes=True)).decode()

    @classmethod
    def from_text(cls, text: str, num_levels: int) -> EntropyModel:
        """The inverse of :meth:`to_text`; raises ``ValueError`` for what it did not write."""
        shapes = [(ENTROPIES, COUNTS), (CLASSES * LEFT, CLASSES - 1), (BEFORE, num_levels)]
        sizes = [rows * columns for rows, columns in shapes]
        flat = np.frombuffer(_unpacked(text, 2 * sum(sizes)), "<u2")
        ends = np.cumsum([0, *sizes])
        return cls(*(flat[a:b].reshape(s) for a, b, s in zip(ends, ends[1:], shapes, strict=False)))

    def encode(self, sequence: Symbols) -> bytes:
        """The record of one sequence."""
        coder = constriction.stream.queue.RangeEncoder()
        categorical, uniform = _families()
        counts = np.minimum(sequence.counts, COUNTS - 1)
        _encode(coder, categorical, counts, self.counts, sequence.counts_context)
        many = sequence.counts[counts == COUNTS - 1]
        if len(many):
            coder.encode(many, constriction.stream.model.Uniform(1 << 16))
        at = 0
        for size in _layers(sequence.counts):
            part = slice(at, at + size)
            at += size
            classes = sequence.classes[part]
            _encode(coder, categorical, classes, self.classes, sequence.classes_context[part])
            wide = classes > 0
            if wide.any():
                coder.encode(sequence.below[part][wide], uniform, _power(classes[wide]))
            _encode(
                coder, categorical, sequence.codes[part], self.codes, sequence.codes_context[part]
            )
        return bytes(coder.get_compressed().astype("<u4").tobytes())

    def decode(
        self, record: npt.NDArray[np.uint8], entropy: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], Ints, npt.NDArray[np.uint8]]:
        """Counts, ranks and codes; the entries of a position by rising rank.

        Raises ``ValueError`` for a record that :meth:`encode` did not write.
        """
        if len(record) % 4:
            raise ValueError("the record's length is not a multiple of 4")
        words = np.frombuffer(record.tobytes(), "<u4")
        coder = constriction.stream.queue.RangeDecoder(words)
        categorical, uniform = _families()
        counts = _decode(coder, categorical, self.counts, _entropy_context(entropy))
        many = counts == COUNTS - 1
        if many.any():
            counts[many] = coder.decode(constriction.stream.model.Uniform(1 << 16), int(many.sum()))
        first = np.cumsum(counts) - counts
        ranks = np.empty(counts.sum(), np.int32)
        codes = np.empty(len(ranks), np.uint8)
        before = np.full(len(counts), -1, np.int32)
        alive = np.flatnonzero(counts)
        for layer in range(counts.max(initial=0)):
            alive = alive[counts[alive] > layer]
            context = _class_context(before[alive], counts[alive] - layer)
            classes = _decode(coder, categorical, self.classes, context)
            below = np.zeros(len(alive), np.int32)
            wide = classes > 0
            if wide.any():
                below[wide] = coder.decode(uniform, _power(classes[wide]))
            before[alive] += (1 << classes) + below
            ranks[first[alive] + layer] = before[alive]
            seen = np.full(len(alive), min(layer, BEFORE - 1), np.int32)
            codes[first[alive] + layer] = _decode(coder, categorical, self.codes, seen)
        return counts.astype(np.int64), ranks, codes


def _unpacked(text: str, size: int) -> bytes:
    try:
        data = base64.b85decode(text)
        return bytes(pa.Codec("zstd").decompress(data, size, asbytes=True)) if size else b""
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"the shard's statistics cannot be read: {error}") from None


@lru_cache(maxsize=1)
def _families() -> tuple[Any, Any]:
    model = constriction.stream.model
    return model.Categorical(perfect=False), model.Uniform()


def _encode(coder: Any, family: Any, values: Ints, table: npt.NDArray[Any], context: Ints) -> None:
    if len(values):
        coder.encode(values, family, table[context])


def _decode(coder: Any, family: Any, table: npt.NDArray[Any], context: Ints) -> Ints:
    if not len(context):
        return np.empty(0, np.int32)
    found: Ints = coder.decode(family, table[context])
    return found


def _scale(table: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    """Frequencies that sum to about ``_TOTAL`` in each context; what occurred keeps at least 1."""
    share = table * _TOTAL // np.maximum(1, table.sum(1, keepdims=True))
    scaled: npt.NDArray[np.uint16] = np.maximum(share, table > 0).astype(np.uint16)
    return scaled


def _layers(counts: Ints) -> list[int]:
    """How many positions have a first entry, a second one, and so on."""
    return [int((counts > layer).sum()) for layer in range(counts.max(initial=0))]


def _log2(values: npt.NDArray[Any]) -> Ints:
    """floor(log2) of positive integers below 2^53."""
    return (np.frexp(values.astype(np.float64))[1] - 1).astype(np.int32)


def _power(classes: Ints) -> Ints:
    return np.left_shift(1, classes).astype(np.int32)


def _class_context(before: npt.NDArray[Any], left: npt.NDArray[Any]) -> Ints:
    """``before``: the rank before, -1 for none; ``left``: entries to come, this one included."""
    known = np.where(before < 0, CLASSES - 1, _log2(np.maximum(before, 0) + 1))
    return (known * LEFT + np.searchsorted([1, 4], left)).astype(np.int32)


def _entropy_context(entropy: npt.NDArray[np.float32]) -> Ints:
    return np.clip(np.rint(2 * entropy), 0, ENTROPIES - 1).astype(np.int32)
