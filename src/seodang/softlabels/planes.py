"""The record of the layout `fast`: fixed planes, decoded by slicing.

Planes in this order, each for the whole sequence, little-endian: entries per position (uint16),
low 16 bits of the ids (uint16), and a byte that holds the weight's code in its low bits and bits
16 and up of the id in the others. If these are too few for the vocabulary, the byte is the code
alone and one more plane (uint8) has the high bits of the ids, which are 24 in all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Planes:
    """The arrangement of the planes for a vocabulary and a number of weight levels."""

    def __init__(self, vocab_size: int, num_levels: int) -> None:
        high_bits = max(0, (vocab_size - 1).bit_length() - 16)
        self.code_bits = (num_levels - 1).bit_length()
        self.shared = 0 < high_bits <= 8 - self.code_bits
        self.separate = high_bits > 0 and not self.shared
        self.entry_bytes = 4 if self.separate else 3

    def size(self, positions: int, entries: int) -> int:
        """Bytes of a record."""
        return 2 * positions + self.entry_bytes * entries

    def encode(
        self, counts: npt.NDArray[np.int64], ids: npt.NDArray[np.int32], codes: Bytes
    ) -> bytes:
        """Pack the entries of one sequence."""
        assert counts.max(initial=0) < 1 << 16
        high = (ids >> 16).astype("u1")
        planes = [counts.astype("<u2"), (ids & 0xFFFF).astype("<u2")]
        planes.append(codes | (high << self.code_bits) if self.shared else codes)
        if self.separate:
            planes.append(high)
        return b"".join(plane.tobytes() for plane in planes)

    def decode(
        self, record: Bytes, positions: int
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int32], Bytes]:
        """Counts, ids and codes; raises ``ValueError`` if the length is not that of the planes."""
        at = 2 * positions
        counts = record[:at].view("<u2")
        nnz, left = divmod(len(record) - at, self.entry_bytes)
        if left or nnz != counts.sum(dtype=np.int64):
            raise ValueError("the record's length is not that of its planes")
        ids = record[at : at + 2 * nnz].view("<u2").astype(np.int32)
        codes = record[at + 2 * nnz : at + 3 * nnz]
        if self.shared:
            high = np.right_shift(codes, self.code_bits).astype(np.int32)
            ids |= np.left_shift(high, 16, out=high)
            codes = np.bitwise_and(codes, np.uint8((1 << self.code_bits) - 1))
        elif self.separate:
            high = record[at + 3 * nnz :].astype(np.int32)
            ids |= np.left_shift(high, 16, out=high)
        return counts, ids, codes
