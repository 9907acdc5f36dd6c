"""What the teacher expected, held against the token that came."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from seodang.corpus.sequences import observed_tokens
from seodang.softlabels.shards import StoreHeader
from seodang.softlabels.store import SoftLabelSequence


def entry_counts(sequence: SoftLabelSequence) -> npt.NDArray[np.int64]:
    """Number of entries of each labelled position, (L,)."""
    return np.diff(sequence.offsets)[sequence.labelled]


def observed_weights(sequence: SoftLabelSequence) -> npt.NDArray[np.float64]:
    """The weight that each label gives to the token that came next, (L,).

    The label of position t is held against token t + 1. The weight is 0 where that token is not
    among the stored ids, and NaN at the last position, after which nothing came.
    """
    counts = entry_counts(sequence)
    rows = np.repeat(np.arange(len(counts)), counts)
    following = observed_tokens(sequence)
    hits = sequence.ids == following[rows]
    weights = np.bincount(rows, sequence.weights * hits, len(counts)).astype(np.float64)
    weights[following < 0] = np.nan
    return weights


def drawn(header: StoreHeader, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Which entries were drawn, so that their weight is an estimate of the teacher's probability.

    A drawn entry of ``head-tail`` has the threshold as its weight; exact ones lie above.
    """
    if header.estimator in ("top-k", "residual"):
        return np.zeros(len(weights), bool)
    if header.estimator == "sampled":
        return np.ones(len(weights), bool)
    return weights <= header.parameters["threshold"] * (1 + 1e-6)  # they are float32
