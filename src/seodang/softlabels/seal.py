"""The seal of a shard: what tells a reader that the file is as it was written.

Parquet has checksums of its pages only, and pyarrow ends the whole process on some damaged
footers. So a seal of 16 bytes stands before the footer, where no reader of Parquet looks: a
checksum of all that comes before it, and one of the footer. They are compared before pyarrow sees
the file. Pages that are read in place, without pyarrow, are left out of the first one: each of
their values has a checksum of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_64, xxh3_64_intdigest

_SEAL = struct.Struct("<QQ")
_TAIL = struct.Struct("<I4s")  # of a Parquet file: the footer's length, and a magic number


def sealed(file: pa.Buffer, in_place: Sequence[str]) -> bytes:
    """A Parquet file with its seal; ``in_place`` names the columns that it does not cover."""
    data = memoryview(file)
    at = _footer_start(data)
    body, footer = data[:at], data[at:]
    checksum = _checksum(body, pq.read_metadata(pa.BufferReader(file)), in_place)
    return b"".join([body, _SEAL.pack(checksum, xxh3_64_intdigest(footer, checksum)), footer])


def open_footer(path: Path, file: npt.NDArray[np.uint8]) -> pq.FileMetaData:
    """The footer of the ``file`` at ``path``; raises ``ValueError`` if it is not as written."""
    data = memoryview(file)  # type: ignore[arg-type]
    at = _footer_start(data)
    checksum, own = _SEAL.unpack(data[max(0, at - _SEAL.size) : at])
    if xxh3_64_intdigest(data[at:], checksum) != own:
        raise ValueError("its footer is not as it was written")
    return pq.read_metadata(path)


def check_body(
    file: npt.NDArray[np.uint8], footer: pq.FileMetaData, in_place: Sequence[str]
) -> None:
    """Raise ``ValueError`` if what the seal covers is not as it was written."""
    data = memoryview(file)  # type: ignore[arg-type]
    at = _footer_start(data) - _SEAL.size
    if _checksum(data[:at], footer, in_place) != _SEAL.unpack(data[at : at + _SEAL.size])[0]:
        raise ValueError("damaged, its checksum differs")


def only_page(footer: pq.FileMetaData, column: str) -> slice:
    """Where the page of a column of one page lies, its header included."""
    group = footer.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    (found,) = [column_ for column_ in columns if column_.path_in_schema == column]
    return slice(found.data_page_offset, found.data_page_offset + found.total_compressed_size)


def _footer_start(data: memoryview) -> int:
    if len(data) >= _TAIL.size + _SEAL.size:
        at = len(data) - _TAIL.size - int(_TAIL.unpack(data[-_TAIL.size :])[0])
        if at >= _SEAL.size:
            return at
    raise ValueError("it is cut short")


def _checksum(body: memoryview, footer: pq.FileMetaData, in_place: Sequence[str]) -> int:
    """XXH3, 64 bits, of everything but the pages that are read in place."""
    state, at = xxh3_64(), 0
    for column in in_place if footer.num_rows else ():
        page = only_page(footer, column)
        state.update(body[at : page.start])
        at = page.stop
    state.update(body[at:])
    return int(state.intdigest())
