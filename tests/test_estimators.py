"""Estimators against the full distribution: bias, variance, which ids are kept, what is stored.

Bounds hold for all quantities of a test at once but for one run in a million (Bernstein's
inequality), whatever the seed.
"""

from functools import cache
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from seodang.softlabels import open as open_store
from seodang.softlabels.estimators import BIASED, Estimation, draw, spread
from seodang.softlabels.quantisation import levels
from tiny_store import (
    LAYOUTS,
    PARAMETERS,
    UNBIASED,
    config_of,
    dense,
    labels_of,
    logits_of,
    probabilities,
    sequences,
    synthetic_store,
)

ONE = 1 << 30  # a kept id, in the phases of `spread`
T = PARAMETERS["head-tail"]["threshold"]
N = PARAMETERS["sampled"]["draws"]
REPEATS = 2000


def positions_of(vocabulary, seed=1):
    """Logits of neighbouring positions: much in common, from nearly uniform to nearly certain."""
    common = logits_of(1, vocabulary, seed)
    own = logits_of(5, vocabulary, seed + 1, 0.3)
    return (common + own) * torch.tensor([0.3, 1, 1.1, 2, 4])[:, None]


def two_points(p, low, high):
    """Variance, fourth central moment and width of what is ``low`` or ``high`` with mean ``p``."""
    width = np.maximum(high - low, 1e-300)
    share = np.clip((p - low) / width, 0, 1)
    spread_of = share * (1 - share)
    return width**2 * spread_of, width**4 * spread_of * (1 - 3 * spread_of), width


def moments(estimator, p):
    """Variance by the formula of each id's weight, its fourth central moment and its range."""
    if estimator == "sampled":
        q = p * (1 - p)
        return q / N, q * (1 + 3 * (N - 2) * q) / N**3, np.full_like(p, 1 / N)
    grid = levels("head-tail", PARAMETERS["head-tail"])
    upper = np.clip(np.searchsorted(grid, p), 1, len(grid) - 1)
    head = p >= T  # exact but for the dither, whose variance is below a quarter of the gap squared
    return two_points(p, np.where(head, grid[upper - 1], 0), np.where(head, grid[upper], T))


@cache
def estimates(estimator, vocabulary):
    """Full distributions, and mean, variance and number of entries over ``REPEATS`` sequences."""
    logits, config = positions_of(vocabulary), config_of(estimator)
    p = probabilities(logits)
    total, squares, counts = np.zeros_like(p), np.zeros_like(p), []
    for seed in range(REPEATS):
        found = labels_of(config, logits, seed)
        difference = dense(found.counts, found.ids, found.weights, vocabulary) - p
        total += difference
        squares += difference**2
        counts.append(found.counts)
    return p, total / REPEATS, squares / REPEATS, np.array(counts)


def bernstein(variance, width, cells, repeats=REPEATS):
    """How far a mean of independent values can be from its expectation."""
    chance = np.log(2e6 * cells)
    return np.sqrt(2 * variance * chance / repeats) + width * chance / (3 * repeats) + 1e-7


@pytest.mark.parametrize("estimator", UNBIASED)
@pytest.mark.parametrize("vocabulary", [7, 300, 1031])
def test_drawn_estimators_are_unbiased_quantisation_included(estimator, vocabulary):
    p, bias, _, _ = estimates(estimator, vocabulary)
    variance, _, width = moments(estimator, p)
    assert (np.abs(bias) <= bernstein(variance, width, p.size)).all()
    mass = np.abs(bias.sum(1))  # the weights of a position sum to 1 in the mean
    assert (mass <= bernstein(variance.sum(1), 1, len(p))).all()


@pytest.mark.parametrize("estimator", UNBIASED)
@pytest.mark.parametrize("vocabulary", [7, 300, 1031])
def test_their_variance_is_that_of_the_formula(estimator, vocabulary):
    p, _, variance, _ = estimates(estimator, vocabulary)
    expected, fourth, width = moments(estimator, p)
    bound = bernstein(np.maximum(0, fourth - expected**2), width**2, p.size)
    assert (np.abs(variance - expected) <= bound).all()
    assert variance.sum() == pytest.approx(expected.sum(), rel=0.03)
    if estimator == "head-tail":
        below = np.where(p < T, p * (T - p), 0)
        np.testing.assert_allclose(np.where(p < T, expected, 0), below, atol=1e-15)
        assert variance[p >= T].max() < 0.05**2 / 4  # the dither's alone
        # At most p(t-p), so never more than that many independent draws would have.
        assert expected.sum() < (p * (1 - p)).sum() / estimates(estimator, vocabulary)[3].mean()


@pytest.mark.parametrize("estimator", sorted(BIASED))
def test_truncation_is_biased_by_the_whole_tail(estimator):
    logits = positions_of(300)
    p = probabilities(logits)
    found = [labels_of(config_of(estimator), logits, seed) for seed in range(200)]
    mean = np.mean([dense(f.counts, f.ids, f.weights, 300) for f in found], 0)
    bias = mean - p
    kept = p >= -np.sort(-p)[:, 4:5]
    np.testing.assert_array_equal(bias[~kept], -p[~kept])
    assert np.abs(bias[kept]).max() < 0.02  # of the quantisation: levels are 12 % apart
    assert (bias[:3].sum(1) < -0.2).all()
    # By far more than chance: each of these is a certainty, not an estimate.
    assert (-bias[:3].min(1) > 0.005).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", UNBIASED)
def test_a_store_keeps_them_unbiased(tmp_path, estimator, layout):
    """Each repetition is a sequence of a store, written and read."""
    repeats, vocabulary = 800, 200
    logits, config = positions_of(vocabulary)[1:4], config_of(estimator, layout=layout)
    p = probabilities(logits)
    items = [s for s in sequences(4 * repeats, longest=6) if len(s.labelled) == 3][:repeats]
    repeats = len(items)
    entries = [labels_of(config, logits, seed) for seed in range(repeats)]
    synthetic_store(tmp_path / "store", config, items, vocabulary=vocabulary, entries=entries)
    total = np.zeros_like(p)
    for found in open_store(tmp_path / "store"):
        counts = np.diff(found.offsets)[found.labelled]
        total += dense(counts, found.ids, found.weights, vocabulary)
    variance, _, width = moments(estimator, p)
    bound = bernstein(variance, width, p.size, repeats)
    assert (np.abs(total / repeats - p) <= bound).all()


@pytest.mark.parametrize("vocabulary", [7, 300, 1031])
def test_the_number_of_entries_is_the_sum_of_their_probabilities(vocabulary):
    p, _, _, counts = estimates("head-tail", vocabulary)
    share = np.minimum(1, p / T)
    bound = bernstein((share * (1 - share)).sum(1), 1, len(p)) + 6 / REPEATS
    assert (np.abs(counts.mean(0) - share.sum(1)) <= bound).all()


def test_an_id_is_kept_with_its_probability_at_every_position():
    """Though the decisions are spread along the sequence: late positions as much as early ones."""
    logits = torch.cat([positions_of(40), positions_of(40, seed=9), positions_of(40)])
    share = np.minimum(1, probabilities(logits) / T)
    repeats, kept = 4000, np.zeros_like(share)
    p = torch.softmax(logits, -1)
    rng = np.random.default_rng(3)
    for _ in range(repeats):
        pairs = spread(p, T, rng.integers(0, ONE, 40, np.int32))
        kept.reshape(-1)[pairs] += 1
    bound = bernstein(share * (1 - share), 1, share.size, repeats)
    assert (np.abs(kept / repeats - share) <= bound).all()
    assert (kept[share == 1] == repeats).all()


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 120),
    st.sampled_from([1, 2, 5, 40]),
    st.floats(1e-4, 0.5),
    st.floats(0.1, 8),
    st.integers(0, 2**31),
)
def test_an_id_is_kept_as_often_as_expected_up_to_one(rows, vocabulary, t, sharpness, seed):
    """Along every run of positions from the first: this is what spreading evenly means."""
    p = torch.softmax(logits_of(rows, vocabulary, seed, sharpness), -1)
    phase = np.random.default_rng(seed).integers(0, ONE, vocabulary, np.int32)
    kept = np.zeros(rows * vocabulary)
    kept[spread(p, t, phase)] = 1
    expected = np.minimum(1, p.double().numpy() / t).cumsum(0)
    times = kept.reshape(rows, vocabulary).cumsum(0)
    assert (np.abs(times - expected) < 1 + 1e-6 * rows).all()
    assert (phase >= 0).all()
    assert (phase < ONE).all()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(list(PARAMETERS)),
    st.integers(0, 30),
    st.sampled_from([1, 9, 300]),
    st.lists(st.integers(0, 30), max_size=4),
    st.integers(0, 2**31),
)
def test_the_entries_do_not_depend_on_how_positions_are_cut(
    estimator, rows, vocabulary, cuts, seed
):
    logits = logits_of(rows, vocabulary, seed)

    def entries(bounds):
        estimate = Estimation(
            estimator, PARAMETERS[estimator], vocabulary, np.random.default_rng(seed)
        )
        parts = [estimate(logits[a:b]) for a, b in pairwise(bounds)]
        return type(parts[0]).concatenate(parts)

    whole = entries([0, rows])
    parts = entries(sorted({0, rows, *(c for c in cuts if c < rows)}) if rows else [0, 0, 0])
    for name in ("counts", "ids", "weights", "head_mass"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    np.testing.assert_allclose(parts.entropy, whole.entropy, rtol=1e-5, atol=1e-6)
    assert estimator != "head-tail" or (whole.weights >= T).all()


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(list(PARAMETERS)),
    st.integers(1, 9),
    st.sampled_from([1, 2, 5, 255, 256, 257, 1000]),
    st.integers(0, 2**31),
    st.floats(0.1, 40),
    st.floats(0, 0.99),
)
def test_entries_are_well_formed_at_any_shape(
    estimator, rows, vocabulary, seed, sharpness, impossible
):
    """With logits of minus infinity among them, as a teacher that masks ids gives."""
    logits = logits_of(rows, vocabulary, seed, sharpness)
    masked = np.random.default_rng(seed).random((rows, vocabulary)) < impossible
    masked[:, seed % vocabulary] = False
    logits[torch.from_numpy(masked)] = -torch.inf
    found = labels_of(config_of(estimator), logits, seed)
    p = probabilities(logits)
    assert found.counts.shape == found.head_mass.shape == found.entropy.shape == (rows,)
    assert found.counts.sum() == len(found.ids) == len(found.weights)
    position = np.repeat(np.arange(rows), found.counts)
    assert len(set(zip(position, found.ids, strict=True))) == len(found.ids)
    of_entry = p[position, found.ids]
    if estimator in UNBIASED:
        assert (of_entry > 0).all()
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-3, atol=1e-4)
    mass = np.bincount(position, found.weights, minlength=rows)
    match estimator:
        case "sampled":
            np.testing.assert_allclose(mass, 1)
            assert (found.head_mass == 0).all()
        case "head-tail":
            head = np.where(p >= T, p, 0)
            np.testing.assert_allclose(found.head_mass, head.sum(1), rtol=1e-4, atol=1e-6)
            assert (np.isin(found.weights, levels("head-tail", PARAMETERS["head-tail"]))).all()
            assert (found.weights[of_entry < T * (1 - 1e-6)] == T).all()
            clear = p > T * (1 + 1e-6)  # every id above the threshold is there
            np.testing.assert_array_equal(
                np.bincount(position[of_entry > T * (1 + 1e-6)], minlength=rows), clear.sum(1)
            )
        case _:
            assert (found.counts == min(5, vocabulary)).all()
            largest = -np.sort(-p)[:, : min(5, vocabulary)]
            np.testing.assert_allclose(found.head_mass, largest.sum(1), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(of_entry, largest.reshape(-1), rtol=1e-4, atol=1e-30)


def test_a_probability_that_is_the_threshold_is_kept_and_exact():
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])
    for t, kept in ((0.25, [0, 1, 4, 5, 6, 7]), (0.125, list(range(8)))):
        for phase in (0, 1, ONE // 3, ONE - 1):
            found = spread(p, t, np.full(4, phase, np.int32)).tolist()
            assert set(kept) <= set(found)
    for seed in range(50):  # the softmax may round it to just below
        config = config_of("head-tail", threshold=0.25)
        entries = labels_of(config, p.log(), seed)
        assert entries.counts[1] == 4
        assert entries.weights[entries.counts[0] :].tolist() == [0.25] * 4


def test_probabilities_that_are_not_numbers_are_seen_in_the_entropy():
    logits = logits_of(4, 30, 0)
    logits[2, 7] = torch.nan
    for estimator in PARAMETERS:
        found = labels_of(config_of(estimator), logits, 0)
        assert np.isfinite(found.entropy).tolist() == [True, True, False, True]
    logits[2] = -torch.inf
    for estimator in PARAMETERS:
        found = labels_of(config_of(estimator), logits, 0)
        assert np.isfinite(found.entropy).tolist() == [True, True, False, True]


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 900), st.integers(0, 2**31))
def test_draws_invert_the_cumulative_distribution(vocabulary, seed):
    rng = np.random.default_rng(seed)
    mass = rng.random((3, vocabulary)) * (rng.random((3, vocabulary)) < 0.3)
    mass[np.arange(3), rng.integers(0, vocabulary, 3)] = 1
    uniforms = rng.random((3, 50))
    uniforms[:, 0], uniforms[:, 1] = 0.0, np.nextafter(1.0, 0.0)
    ids = draw(torch.from_numpy(mass).float(), uniforms)
    mass = mass.astype(np.float32).astype(np.float64)
    for row in range(3):
        assert (mass[row, ids[row]] > 0).all()
        upto = mass[row].cumsum()
        expected = np.searchsorted(upto, uniforms[row] * upto[-1], side="right")
        # Equal but where a target falls within rounding of a boundary.
        near = np.abs(upto[:, None] - uniforms[row] * upto[-1]).min(0) < 1e-9 * upto[-1]
        assert ((expected == ids[row]) | near).all()
