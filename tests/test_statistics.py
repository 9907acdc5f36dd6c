"""Intervals and paired tests, against plain loops and textbook numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from seodang.evaluation.statistics import (
    calibration_error,
    difference,
    interval,
    mcnemar,
    mean_of,
    paired_interval,
    ratio,
)

UNIT = st.floats(0, 1, width=32)
COLUMN = hnp.arrays(np.float64, st.integers(1, 60), elements=UNIT)


@given(hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=4, min_side=0), elements=UNIT))
def test_ratio_is_that_of_the_sums_over_examples(values: np.ndarray) -> None:
    table = np.stack([values, values[..., ::-1].copy()], -1)
    found = ratio(table)
    assert found.shape == values.shape[:-1]
    for index in np.ndindex(values.shape[:-1]):
        top, bottom = math.fsum(table[index][:, 0]), math.fsum(table[index][:, 1])
        assert found[index] == pytest.approx(top / bottom if bottom else 0, rel=1e-9, abs=1e-12)


@given(COLUMN, st.integers(0, 2**31), st.integers(1, 20))
def test_calibration_error_is_that_of_a_loop_over_bins(
    confidence: np.ndarray, seed: int, bins: int
) -> None:
    correct = np.random.default_rng(seed).integers(0, 2, len(confidence))
    gaps = [0.0] * bins
    for sure, right in zip(confidence, correct, strict=True):
        gaps[min(int(sure * bins), bins - 1)] += sure - right
    expected = sum(map(abs, gaps)) / len(confidence)
    table = np.stack([confidence, correct], -1)
    assert float(calibration_error(table, bins)) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 300), st.data())
def test_interval_of_outcomes_is_wilsons(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    found = interval(mean_of([1] * right + [0] * (n - right)))
    z, p = stats.norm.ppf(0.975), right / n
    middle, reach = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found.value == p
    assert found.low == pytest.approx((middle - reach) / (1 + z**2 / n), abs=1e-12)
    assert found.high == pytest.approx((middle + reach) / (1 + z**2 / n), abs=1e-12)
    assert found.low < 1
    assert found.high > 0


@settings(max_examples=25)
@given(COLUMN, st.sampled_from([ratio, calibration_error]))
def test_interval_holds_whatever_the_numbers_are(values: np.ndarray, statistic: object) -> None:
    table = mean_of(values) if statistic is ratio else np.stack([values, values > 0.5], -1)
    found = interval(table, statistic)
    assert found.n == len(values)
    if found.n == 1 and found.low is None:
        assert found.high is None
    else:
        assert 0 <= found.low <= found.high <= 1
    assert found == interval(table, statistic)


def test_mean_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        found = interval(mean_of(rng.beta(2, 5, 60)))
        covered += found.low <= 2 / 7 <= found.high
    assert 180 <= covered <= 198


def test_ratio_interval_is_as_wide_as_the_delta_method_says() -> None:
    rng = np.random.default_rng(3)
    bottom = rng.integers(0, 3, 800).astype(float)
    top = bottom * rng.random(800)
    found = interval(np.stack([top, bottom], -1))
    residual = (top - found.value * bottom) / bottom.mean()
    reach = 1.96 * residual.std() / math.sqrt(800)
    assert found.low == pytest.approx(found.value - reach, abs=0.1 * reach)
    assert found.high == pytest.approx(found.value + reach, abs=0.1 * reach)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_two_sided_binomial_tail(better: int, worse: int) -> None:
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    assert mcnemar(better, worse) == pytest.approx(min(1.0, 2 * tail))


def test_difference_of_outcomes_is_agresti_and_mins() -> None:
    ours, theirs = np.zeros(1600), np.zeros(1600)
    ours[:144] = 1
    theirs[144:198] = 1
    found = difference(mean_of(ours), mean_of(theirs))
    b, c, n = 144.5, 54.5, 1602
    reach = stats.norm.ppf(0.975) * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    assert (found.value, found.test) == (pytest.approx(90 / 1600), "mcnemar")
    assert found.low == pytest.approx((b - c) / n - reach)
    assert found.high == pytest.approx((b - c) / n + reach)
    assert found.p == pytest.approx(stats.binomtest(54, 198).pvalue)


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_permutation_test_counts_every_swap(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = (np.stack([rng.random(n), 1 + rng.random(n)], -1) for _ in range(2))
    seen = float(ratio(ours) - ratio(theirs))
    lower = upper = 0
    for swaps in itertools.product([False, True], repeat=n):
        swapped = np.array(swaps)[:, None]
        value = float(
            ratio(np.where(swapped, theirs, ours)) - ratio(np.where(swapped, ours, theirs))
        )
        lower += value <= seen + 1e-12
        upper += value >= seen - 1e-12
    found = difference(ours, theirs)
    assert found.test == "permutation"
    assert found.p == pytest.approx(min(1.0, 2 * min(lower, upper) / 2**n))


def test_a_clear_difference_is_significant_and_none_is_not() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(80)
    better = difference(mean_of(base * 0.9 + 0.1), mean_of(base))
    assert better.p < 0.001
    assert 0 < better.low < better.value < better.high
    noise = difference(mean_of(base), mean_of(rng.permutation(base)))
    assert noise.p > 0.05
    assert noise.low < 0 < noise.high
    same = difference(mean_of(base), mean_of(base))
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


@settings(max_examples=15)
@given(st.integers(2, 40), st.integers(0, 2**31), st.sampled_from([ratio, calibration_error]))
def test_swapping_the_models_turns_the_sign(n: int, seed: int, statistic: object) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = (np.stack([rng.random(n), rng.integers(0, 2, n) + 0.0], -1) for _ in range(2))
    one, other = (paired_interval(*pair, statistic) for pair in ((ours, theirs), (theirs, ours)))
    assert one.value == pytest.approx(-other.value)
    assert one.low == pytest.approx(-other.high, abs=0.1)


def test_what_cannot_be_measured_is_refused() -> None:
    for table in (np.zeros((0, 2)), np.zeros(3), np.array([[math.nan, 1.0]])):
        with pytest.raises(ValueError, match=r"table of examples|not a finite number"):
            interval(table)
    with pytest.raises(ValueError, match="not paired"):
        difference(mean_of([1]), mean_of([1, 0]))
    alone = difference(mean_of([0.3]), mean_of([0.5]))
    assert (alone.low, alone.high, alone.p) == (None, None, 1.0)


def test_a_thousand_examples_and_more() -> None:
    rng = np.random.default_rng(1)
    values = rng.random(5003)
    found = interval(mean_of(values))
    reach = 1.96 * values.std() / math.sqrt(5003)
    assert found.high - found.low == pytest.approx(2 * reach, rel=0.1)
