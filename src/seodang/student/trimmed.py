"""A trimmed vocabulary: which entries of the teacher's are kept, and how the others are spelled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from seodang.artifact import write_atomically
from seodang.errors import InputError

VOCABULARY = "vocabulary.safetensors"  # in the student's directory

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TrimmedVocabulary:
    """The teacher's ids ("old") against the student's ("new").

    ``kept`` int32 (new,) is the old id of every new one, in rising order; -1, at the end, for
    bytes that the teacher's tokenizer lacks. The new ids that spell the old id i are
    ``pieces[piece_offsets[i]:piece_offsets[i + 1]]`` (int32; int64 (old + 1,)): one for what is
    kept, several for what is not, none for ids without a text, such as rows that pad an embedding.
    """

    kept: Int32
    piece_offsets: Int64
    pieces: Int32

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.kept)

    @property
    def old_size(self) -> int:
        """Number of ids of the teacher's output."""
        return len(self.piece_offsets) - 1

    @cached_property
    def new_ids(self) -> Int32:
        """The new id of every old one, (old,); -1 for what is not kept."""
        found = np.full(self.old_size, -1, np.int32)
        of_teacher = self.kept >= 0
        found[self.kept[of_teacher]] = np.flatnonzero(of_teacher)
        return found

    @cached_property
    def lengths(self) -> Int64:
        """Number of pieces of every old id, (old,)."""
        return np.diff(self.piece_offsets)

    @cached_property
    def first(self) -> Int32:
        """The first piece of every old id, (old,); -1 for ids without a text."""
        found = np.full(self.old_size, -1, np.int32)
        written = self.lengths > 0
        found[written] = self.pieces[self.piece_offsets[:-1][written]]
        return found

    def spell_out(self, token_ids: npt.NDArray[np.integer]) -> tuple[Int32, Int64]:
        """Old token ids (T,) as new ones, and the position of the last piece of each, (T,).

        Raises ``ValueError`` for an id that has no text.
        """
        lengths = self.lengths[token_ids]
        if not lengths.all():
            raise ValueError(f"the id {token_ids[lengths.argmin()]} has no text, so no spelling")
        stops = np.cumsum(lengths)
        shift = self.piece_offsets[token_ids] - (stops - lengths)
        index = np.repeat(shift, lengths) + np.arange(stops[-1] if len(stops) else 0)
        return self.pieces[index], stops - 1

    def save(self, path: Path) -> None:
        """Write the file; equal vocabularies give equal bytes."""
        tensors: dict[str, npt.NDArray[np.generic]] = {
            "kept": self.kept,
            "piece_offsets": self.piece_offsets,
            "pieces": self.pieces,
        }
        write_atomically(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote; raises ``InputError`` if it is not that."""
        try:
            tensors = load_file(path)
            return cls(tensors["kept"], tensors["piece_offsets"], tensors["pieces"])
        except (OSError, KeyError, SafetensorError) as error:
            raise InputError(f"{path}: not a trimmed vocabulary: {error}") from None
