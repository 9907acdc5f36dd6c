"""Damage to files, for tests: a flipped bit, a missing end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """One bit is another for a while; the bytes around it are not written."""
    with file.open("r+b", buffering=0) as opened:

        def flip() -> None:
            opened.seek(bit // 8)
            (byte,) = opened.read(1)
            opened.seek(bit // 8)
            opened.write(bytes([byte ^ 1 << bit % 8]))

        flip()
        try:
            yield
        finally:
            flip()


@contextmanager
def truncated(file: Path, size: int) -> Iterator[None]:
    """The file ends after ``size`` bytes for a while."""
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    try:
        yield
    finally:
        file.write_bytes(whole)
