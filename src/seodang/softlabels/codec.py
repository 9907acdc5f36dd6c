"""The record codec, version 1: the entries of one sequence as bytes.

Planes in this order, each for the whole sequence, little-endian: entries per position (uint16),
low 16 bits of the ids (uint16), high bits of the ids (uint8, absent for vocabularies up to 2^16),
draws (uint8, absent for estimators that draw nothing), quantised probability (uint16, absent for
``sampled``, whose weights are its counts). Ids reach 2^24.

A probability is kept as round(-ln p / STEP): a relative error of at most STEP/2 = 2.4e-4 down to
p = e^-32, below which it is 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from seodang.errors import InputError
from seodang.recipe import EstimatorName
from seodang.softlabels.estimators import Entries

CODEC_VERSION = 1
STEP = 32 / 65534
_ZERO = 65535


def quantise(p: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Probabilities in [0, 1] to codes; see the module's docstring for the error."""
    with np.errstate(divide="ignore"):
        codes = np.rint(-np.log(p.astype(np.float64)) / STEP)
    return np.where(codes <= _ZERO - 1, np.maximum(codes, 0), _ZERO).astype(np.uint16)


def dequantise(codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The inverse of :func:`quantise`."""
    p = np.exp(-codes.astype(np.float64) * STEP)
    return np.where(codes == _ZERO, 0.0, p).astype(np.float32)


def encode(entries: Entries, estimator: EstimatorName, vocab_size: int) -> bytes:
    """Pack the entries of one sequence.

    Raises ``InputError`` for a vocabulary beyond 2^24 ids, which the record cannot hold.
    """
    if vocab_size > 1 << 24:
        raise InputError(f"a vocabulary of {vocab_size} ids is beyond the record's 2^24")
    planes = [entries.counts.astype("<u2"), (entries.ids & 0xFFFF).astype("<u2")]
    if vocab_size > 1 << 16:
        planes.append((entries.ids >> 16).astype("u1"))
    if estimator in ("sampled", "head-tail"):
        planes.append(entries.draws.astype("u1"))
    if estimator != "sampled":
        planes.append(quantise(entries.p).astype("<u2"))
    return b"".join(plane.tobytes() for plane in planes)


def decode(
    record: bytes | memoryview,
    positions: int,
    head_mass: npt.NDArray[np.float32],
    entropy: npt.NDArray[np.float32],
    estimator: EstimatorName,
    vocab_size: int,
) -> Entries:
    """Unpack what :func:`encode` packed; ``p`` is 0 where it is not stored.

    Raises ``ValueError`` if the record's length is not that of its planes.
    """
    counts = np.frombuffer(record, "<u2", positions).astype(np.int64)
    nnz, at = int(counts.sum()), 2 * positions

    def plane(dtype: str) -> npt.NDArray[np.int64]:
        nonlocal at
        values = np.frombuffer(record, dtype, nnz, at)
        at += values.nbytes
        return values.astype(np.int64)

    ids = plane("<u2")
    if vocab_size > 1 << 16:
        ids |= plane("u1") << 16
    drawn = estimator in ("sampled", "head-tail")
    draws = plane("u1") if drawn else np.zeros(nnz, np.int64)
    if estimator == "sampled":
        p = np.zeros(nnz, np.float32)
    else:
        p = dequantise(plane("<u2").astype(np.uint16))
    if at != len(record):
        raise ValueError(f"record of {len(record)} bytes, its planes are {at}")
    return Entries(counts, ids.astype(np.int32), p, draws, head_mass, entropy)
