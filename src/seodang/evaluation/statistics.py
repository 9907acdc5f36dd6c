"""Confidence intervals and paired tests of figures that are taken over examples.

A figure is a *statistic* of a table with one row per example (n, columns): the mean or a ratio of
sums (:func:`ratio`), or the expected calibration error (:func:`calibration_error`). Statistics
reduce the last axis but one, so that thousands of resamples are taken at once.

- Interval: the bias-corrected and accelerated bootstrap (Efron 1987, "Better Bootstrap Confidence
  Intervals"), where it is not defined the percentile one. For outcomes of 0 and 1 Wilson's score
  interval (Wilson 1927), which also says something about a model that is always right.
- Difference of two models on the same examples: the paired bootstrap (Koehn 2004, "Statistical
  Significance Tests for Machine Translation Evaluation"); for 0 and 1 the adjusted Wald interval
  of paired proportions (Agresti and Min 2005).
- Test of no difference, two-sided: McNemar's exact test (1947) for 0 and 1, otherwise approximate
  randomisation, which swaps the two models' results of an example (Noreen 1989). Which test suits
  which figure: Dror et al. 2018, "The Hitchhiker's Guide to Testing Statistical Significance in
  Natural Language Processing".

The resampling is SciPy's, seeded: the same tables give the same numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Float = npt.NDArray[np.float64]
Statistic = Callable[[Float], Float]

CONFIDENCE = 0.95
BOOTSTRAP_RESAMPLES = 2_000
PERMUTATIONS = 9_999  # every one of them where there are fewer
CALIBRATION_BINS = 15
_GATHERED = 4_000_000  # numbers of one batch of resamples


@dataclass(frozen=True)
class Interval:
    """A figure over ``n`` examples with its interval; without one where n says nothing of it."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """The figure of one model minus that of another, its interval, and the test of no difference.

    ``p`` is two-sided; ``test`` is ``mcnemar`` or ``permutation``.
    """

    value: float
    low: float | None
    high: float | None
    p: float
    test: str
    n: int


def ratio(table: Float) -> Float:
    """Sum of the first column over that of the second, (..., n, 2) to (...); 0 if that is 0.

    A mean is a ratio whose second column holds ones.
    """
    top, bottom = np.moveaxis(table.sum(axis=-2), -1, 0)
    return np.asarray(np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0))


def calibration_error(table: Float, bins: int = CALIBRATION_BINS) -> Float:
    """Expected calibration error of (confidence, correct), (..., n, 2) to (...).

    Bins of equal width; Guo et al. 2017, arXiv 1706.04599, eq. 3.
    """
    confidence, correct = table[..., 0], table[..., 1]
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        np.abs(np.where(bin_of == index, confidence - correct, 0.0).sum(axis=-1))
        for index in range(bins)
    ]
    return np.asarray(sum(gaps) / table.shape[-2])


def mean_of(values: npt.ArrayLike) -> Float:
    """The table (n, 2) whose ratio is the mean of ``values`` (n,)."""
    column = np.asarray(values, np.float64)
    return np.stack([column, np.ones_like(column)], axis=-1)


def interval(table: Float, statistic: Statistic = ratio, *, seed: int = 0) -> Interval:
    """A figure with its interval of 95 %.

    ``table`` is (n, columns) with independent rows: where examples hang together, as the passages
    of one query do, a row is a query. Raises ``ValueError`` if there is no row, or if a number is
    not finite.
    """
    _check(table)
    value, n = float(statistic(table)), len(table)
    if _are_outcomes(statistic, table):
        found = stats.binomtest(int(table[:, 0].sum()), n).proportion_ci(CONFIDENCE, "wilson")
        return Interval(value, float(found.low), float(found.high), n)
    low, high = _bootstrap(partial(_of_rows, table, statistic), n, seed)
    return Interval(value, low, high, n)


def difference(
    ours: Float, theirs: Float, statistic: Statistic = ratio, *, seed: int = 0
) -> Difference:
    """Our figure minus theirs on the same examples: rows (n, columns) in the same order.

    Raises ``ValueError`` for tables of unequal shape, without rows, or with a number that is not
    finite.
    """
    found = paired_interval(ours, theirs, statistic, seed=seed)
    if _are_outcomes(statistic, ours, theirs):
        p, test = mcnemar(*_discordant(ours, theirs)), "mcnemar"
    else:
        p, test = _permutation(ours, theirs, statistic, seed), "permutation"
    return Difference(found.value, found.low, found.high, p, test, found.n)


def paired_interval(
    ours: Float, theirs: Float, statistic: Statistic = ratio, *, seed: int = 0
) -> Interval:
    """The same without the test."""
    if ours.shape != theirs.shape:
        raise ValueError(f"tables of the shapes {ours.shape} and {theirs.shape} are not paired")
    _check(ours)
    _check(theirs)
    n = len(ours)
    value = float(statistic(ours)) - float(statistic(theirs))
    if _are_outcomes(statistic, ours, theirs):
        return Interval(value, *_paired_proportions(*_discordant(ours, theirs), n), n)

    def of_rows(rows: npt.NDArray[np.int64], axis: int = -1) -> Float:
        return _of_rows(ours, statistic, rows) - _of_rows(theirs, statistic, rows)

    return Interval(value, *_bootstrap(of_rows, n, seed), n)


def _are_outcomes(statistic: Statistic, *tables: Float) -> bool:
    """Whether a figure is the mean of outcomes that are 0 or 1."""
    return statistic is ratio and all(
        bool((table[:, 1] == 1).all() and np.isin(table[:, 0], (0.0, 1.0)).all())
        for table in tables
    )


def _discordant(ours: Float, theirs: Float) -> tuple[int, int]:
    """On how many examples only we are right, and only they."""
    return int((ours[:, 0] > theirs[:, 0]).sum()), int((ours[:, 0] < theirs[:, 0]).sum())


def mcnemar(better: int, worse: int) -> float:
    """The two-sided p of McNemar's exact test: of the examples that one model alone got right."""
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _permutation(ours: Float, theirs: Float, statistic: Statistic, seed: int) -> float:
    """Two-sided p of swapping the models' results of each example or leaving them."""
    n = len(ours)
    if n < 2 or np.array_equal(ours, theirs):
        return 1.0
    both = np.concatenate([ours, theirs])

    def swapped(first: Any, second: Any, axis: int = -1) -> Float:
        return _of_rows(both, statistic, first) - _of_rows(both, statistic, second)

    found = stats.permutation_test(
        (np.arange(n), np.arange(n, 2 * n)),
        swapped,
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=max(1, _GATHERED // both.size),
        axis=-1,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _bootstrap(of_rows: Any, n: int, seed: int) -> tuple[float | None, float | None]:
    """BCa, or the percentile interval where BCa is not defined; None for a single example."""
    if n < 2:
        return None, None
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():  # of degenerate resamples: seen in the result
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                (np.arange(n),),
                of_rows,
                vectorized=True,
                n_resamples=BOOTSTRAP_RESAMPLES,
                batch=max(1, _GATHERED // (4 * n)),
                axis=-1,
                confidence_level=CONFIDENCE,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        low, high = float(found.low), float(found.high)
        if math.isfinite(low) and math.isfinite(high):
            break
    return low, high


def _of_rows(table: Float, statistic: Statistic, rows: Any, axis: int = -1) -> Float:
    """The statistic of resamples: ``rows`` (..., n) to (...). SciPy may hand over floats."""
    return statistic(table[np.asarray(rows).astype(np.int64)])


def _paired_proportions(better: int, worse: int, n: int) -> tuple[float, float]:
    """Agresti and Min 2005: half an example is added to each of the four cells."""
    b, c, total = better + 0.5, worse + 0.5, n + 2
    middle = (b - c) / total
    error = math.sqrt(b + c - (b - c) ** 2 / total) / total
    reach = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * error
    return max(-1.0, middle - reach), min(1.0, middle + reach)


def _check(table: Float) -> None:
    if table.ndim != 2 or not len(table):
        raise ValueError(f"a figure needs a table of examples, not one of the shape {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("a result of an example is not a finite number")
