"""Weights as codes: levels that rise, rounding that is exact in the mean, and codes that fit."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from seodang.softlabels.quantisation import LARGEST_LOGIT, dither, levels, nearest_codes

SETTINGS = st.one_of(
    st.integers(1, 255).map(lambda n: ("sampled", {"draws": n})),
    st.floats(1e-4, 0.5).map(lambda t: ("head-tail", {"threshold": t})),
    st.integers(1, 65535).map(lambda k: ("top-k", {"k": k})),
    st.integers(1, 65535).map(lambda k: ("residual", {"k": k})),
)
LEVELS = {
    "sampled": levels("sampled", {"draws": 50}),
    "head-tail": levels("head-tail", {"threshold": 0.06}),
    "top-k": levels("top-k", {"k": 16}),
}


@given(SETTINGS)
def test_levels_rise_to_one_and_their_codes_fit_a_byte(setting):
    found = levels(*setting)
    assert (np.diff(found) > 0).all()
    assert found[-1] == 1
    assert len(found) <= 256
    assert (found >= 0).all()
    match setting:
        case "sampled", {"draws": draws}:  # every count over the number of draws
            np.testing.assert_array_equal(found, np.arange(draws + 1) / draws)
        case "head-tail", {"threshold": t}:  # the weight of the tail is exact
            assert found[0] == t
            assert len(found) == 64
        case _:
            assert found[0] == 0
    # In float32, as a reader has them, they can still be told apart.
    assert (np.diff(found.astype(np.float32)) > 0).all()


@pytest.mark.parametrize(("estimator", "step"), [("head-tail", 0.206), ("top-k", 0.1123)])
def test_the_gap_of_two_levels_is_small_beside_p_and_beside_its_rest(estimator, step):
    """Levels are even in the logit of p, so the gap over p(1-p) is below exp(step) - 1."""
    inner = LEVELS[estimator][1:-1]
    gaps = np.diff(inner) / (inner[:-1] * (1 - inner[:-1]))
    assert 0.9 * step < gaps.min() <= gaps.max() < np.expm1(step)
    assert inner[-1] == pytest.approx(1 / (1 + np.exp(-LARGEST_LOGIT)))


@settings(max_examples=200)
@given(
    st.sampled_from(list(LEVELS)),
    st.lists(st.floats(0, 1), min_size=1, max_size=30),
    st.integers(0, 2**32),
)
def test_dither_moves_to_a_neighbour_and_keeps_levels(estimator, shares, seed):
    grid = LEVELS[estimator]
    weights = grid[0] + (1 - grid[0]) * np.array(shares)
    weights = np.concatenate([weights, grid])  # levels themselves, the first and the last
    found = dither(weights, grid, np.random.default_rng(seed).random(len(weights)))
    assert np.isin(found, grid).all()
    np.testing.assert_array_equal(found[len(shares) :], grid)
    low = grid[np.searchsorted(grid, weights, side="right") - 1]
    high = grid[np.minimum(np.searchsorted(grid, weights), len(grid) - 1)]
    assert ((found == low) | (found == high)).all()


@settings(max_examples=100)
@given(st.sampled_from(list(LEVELS)), st.floats(0, 1))
def test_dither_is_exact_in_the_mean_and_adds_at_most_a_quarter_of_the_squared_gap(
    estimator, share
):
    """Not by chance: the uniform numbers are a grid of midpoints, so the mean is an integral."""
    grid = LEVELS[estimator]
    weight = grid[0] + (1 - grid[0]) * share
    n = 4000
    found = dither(np.full(n, weight), grid, (np.arange(n) + 0.5) / n)
    upper = np.clip(np.searchsorted(grid, weight), 1, len(grid) - 1)
    gap = grid[upper] - grid[upper - 1]
    assert abs(found.mean() - weight) <= gap / n + 1e-12
    assert found.var() <= gap**2 / 4 + 1e-12


@given(st.sampled_from(list(LEVELS)), st.lists(st.floats(0, 1), max_size=30))
def test_codes_name_the_nearest_level(estimator, shares):
    grid = LEVELS[estimator]
    weights = grid[0] + (1 - grid[0]) * np.array(shares)
    codes = nearest_codes(weights, grid)
    assert codes.dtype == np.uint8
    distance = np.abs(grid[None] - weights[:, None])
    np.testing.assert_array_equal(distance[np.arange(len(weights)), codes], distance.min(1))
    np.testing.assert_array_equal(nearest_codes(grid, grid), np.arange(len(grid)))
