"""Weights as small codes: the levels of each estimator, and rounding to them without bias.

A weight is stored as the index of a level. The levels of a probability are even in its logit, so
that both a small p and a small 1-p keep their relative precision. Rounding to the lower or upper
neighbour is random, with the probabilities that make the mean exact (dithering), so a quantised
unbiased estimator stays unbiased; it adds at most a quarter of the squared gap of the two levels
to the variance of that weight.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from seodang.recipe import EstimatorName
from seodang.softlabels.estimators import Parameters

LARGEST_LOGIT = 10.0  # levels end at 1 - 4.5e-5, and 1 itself
SMALLEST_LOGIT = -18.4  # of top-k and residual: 1e-8

Floats = npt.NDArray[np.float64]


def levels(estimator: EstimatorName, parameters: Parameters) -> Floats:
    """The weights that an estimator can store, (at most 256,), rising.

    ``sampled``: multiples of 1/N. ``head-tail``: 64 from the threshold, which is the weight of
    every id of the tail, to 1. ``top-k`` and ``residual``: 0 and 255 from 1e-8 to 1.
    """
    if estimator == "sampled":
        draws = int(parameters["draws"])
        return np.arange(draws + 1) / draws
    if estimator == "head-tail":
        t = float(parameters["threshold"])
        grid = _expit(np.linspace(math.log(t / (1 - t)), LARGEST_LOGIT, 63))
        return np.concatenate([[t], grid[1:], [1.0]])
    return np.concatenate([[0.0], _expit(np.linspace(SMALLEST_LOGIT, LARGEST_LOGIT, 254)), [1.0]])


def dither(weights: Floats, levels: Floats, uniforms: Floats) -> Floats:
    """Weights in [levels[0], levels[-1]] moved to a neighbouring level, exact in the mean.

    ``uniforms`` in [0, 1), one for each weight. A weight that is a level stays.
    """
    upper = np.clip(np.searchsorted(levels, weights), 1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    share = (weights - low) / (high - low)
    return np.where(uniforms < share, high, low)


def nearest_codes(weights: Floats, levels: Floats) -> npt.NDArray[np.uint8]:
    """The index of the nearest level of each weight."""
    upper = np.clip(np.searchsorted(levels, weights), 1, len(levels) - 1)
    nearer = weights - levels[upper - 1] < levels[upper] - weights
    return (upper - nearer).astype(np.uint8)


def _expit(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))
