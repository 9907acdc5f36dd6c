"""Estimators against the full distribution: bias, variance, and what is stored."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from seodang.softlabels.codec import STEP, decode, dequantise, encode, quantise
from seodang.softlabels.estimators import draw, estimate, weights

PARAMETERS = {
    "top-k": {"k": 5},
    "residual": {"k": 5},
    "sampled": {"draws": 12},
    "head-tail": {"head": 4, "draws": 6},
}


def log_probs(rows, vocabulary, seed, sharpness=2.0):
    g = torch.Generator().manual_seed(seed)
    return torch.log_softmax(sharpness * torch.randn(rows, vocabulary, generator=g), -1)


def dense(entries, estimator, parameters, vocabulary):
    """Stored labels as a (rows, vocabulary) matrix of weights."""
    w = weights(estimator, parameters, entries.counts, entries.p, entries.draws, entries.head_mass)
    out = np.zeros((len(entries.counts), vocabulary))
    rows = np.repeat(np.arange(len(entries.counts)), entries.counts)
    np.add.at(out, (rows, entries.ids), w)
    return out


def mean_estimate(estimator, lp, repeats, seed):
    """Mean and variance over independent draws of the estimate of one distribution."""
    parameters = PARAMETERS[estimator]
    uniforms = np.random.default_rng(seed).random((repeats, parameters.get("draws", 0)))
    entries = estimate(lp.repeat(repeats, 1), estimator, parameters, uniforms)
    found = dense(entries, estimator, parameters, lp.shape[1])
    return found.mean(0), found.var(0)


@pytest.mark.parametrize("estimator", ["sampled", "head-tail"])
@pytest.mark.parametrize("vocabulary", [7, 300, 1031])
def test_drawn_estimators_are_unbiased_with_the_variance_of_the_formula(estimator, vocabulary):
    repeats = 20_000
    lp = log_probs(1, vocabulary, seed=vocabulary)
    p = lp.exp().double().numpy()[0]
    mean, variance = mean_estimate(estimator, lp, repeats, seed=vocabulary + 1)
    m = PARAMETERS[estimator]["draws"]
    tail = p.copy()  # what is drawn from: a multinomial of mass r
    if estimator == "head-tail":
        tail[np.argsort(-p)[: PARAMETERS[estimator]["head"]]] = 0
    r = tail.sum()
    expected = r**2 * (tail / r) * (1 - tail / r) / m
    # Bernstein's inequality for every id at once, wrong once in a million.
    t = np.log(2e6 * vocabulary)
    bound = np.sqrt(2 * expected * t / repeats) + r * t / (3 * repeats * m) + 1e-6
    assert (np.abs(mean - p) <= bound).all()
    likely = repeats * expected.clip(1e-12) > 0.05
    np.testing.assert_allclose(variance[likely], expected[likely], rtol=0.35, atol=2e-5)
    # Measured on the largest of them, where the sample is enough for a sharp comparison.
    top = np.argmax(expected)
    assert variance[top] == pytest.approx(expected[top], rel=0.08)


@pytest.mark.parametrize("estimator", ["top-k", "residual"])
def test_truncation_is_biased(estimator):
    lp = log_probs(1, 300, seed=3)
    mean, _ = mean_estimate(estimator, lp, 10, seed=4)
    p = lp.exp().numpy()[0]
    assert (mean == 0).sum() == 300 - 5
    assert 1 - mean.sum() == pytest.approx(p[np.argsort(-p)[5:]].sum(), abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(list(PARAMETERS)),
    st.integers(0, 9),
    st.sampled_from([1, 2, 5, 256, 257, 1000]),
    st.integers(0, 2**31),
    st.floats(0.1, 40),
)
def test_entries_are_well_formed_at_any_shape(estimator, rows, vocabulary, seed, sharpness):
    parameters = PARAMETERS[estimator]
    lp = log_probs(rows, vocabulary, seed, sharpness)
    uniforms = np.random.default_rng(seed).random((rows, parameters.get("draws", 0)))
    entries = estimate(lp, estimator, parameters, uniforms)
    p = lp.exp().numpy()
    assert entries.counts.shape == (rows,)
    at = 0
    for row, count in enumerate(entries.counts):
        ids = entries.ids[at : at + count]
        assert len(set(ids.tolist())) == count
        np.testing.assert_allclose(entries.p[at : at + count], p[row, ids], rtol=1e-5)
        assert (p[row, ids] > 0).all() or estimator in ("top-k", "residual", "head-tail")
        at += count
    assert at == len(entries.ids) == len(entries.p) == len(entries.draws)
    w = dense(entries, estimator, parameters, vocabulary)
    if estimator in ("sampled", "head-tail") and rows:
        np.testing.assert_allclose(w.sum(1), 1, atol=2e-3)
    expected = -(p.astype(np.float64) * np.where(p > 0, lp.numpy(), 0)).sum(1)
    np.testing.assert_allclose(entries.entropy, expected, rtol=1e-3, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 900), st.integers(0, 2**31))
def test_draws_invert_the_cumulative_distribution(vocabulary, seed):
    rng = np.random.default_rng(seed)
    mass = rng.random((3, vocabulary)) * (rng.random((3, vocabulary)) < 0.3)
    mass[2] = 0
    uniforms = rng.random((3, 50))
    uniforms[:, 0], uniforms[:, 1] = 0.0, np.nextafter(1.0, 0.0)
    ids, possible = draw(torch.from_numpy(mass).float(), uniforms)
    assert possible.tolist() == (mass.sum(1) > 0).tolist()
    mass = mass.astype(np.float32).astype(np.float64)
    for row in np.flatnonzero(possible):
        assert (mass[row, ids[row]] > 0).all()
        upto = mass[row].cumsum()
        expected = np.searchsorted(upto, uniforms[row] * upto[-1], side="right")
        # Equal but where a target falls within rounding of a boundary.
        different = expected != ids[row]
        near = np.abs(upto[:, None] - uniforms[row] * upto[-1]).min(0) < 1e-9 * upto[-1]
        assert (~different | near).all()


@given(st.lists(st.floats(0, 1, width=32), max_size=50))
def test_quantised_probabilities_keep_their_stated_precision(values):
    p = np.array(values, np.float32)
    found = dequantise(quantise(p))
    kept = p > np.exp(-31.9)
    np.testing.assert_allclose(found[kept], p[kept], rtol=0.51 * STEP)
    assert (found[~kept] <= 1.5e-14).all()


@settings(deadline=None)
@given(
    st.sampled_from(list(PARAMETERS)),
    st.integers(0, 20),
    st.sampled_from([300, 70_000]),
    st.integers(0, 2**31),
)
def test_records_round_trip(estimator, rows, vocabulary, seed):
    lp = log_probs(rows, vocabulary, seed)
    parameters = PARAMETERS[estimator]
    uniforms = np.random.default_rng(seed).random((rows, parameters.get("draws", 0)))
    entries = estimate(lp, estimator, parameters, uniforms)
    record = encode(entries, estimator, vocabulary)
    found = decode(record, rows, entries.head_mass, entries.entropy, estimator, vocabulary)
    for name in ("counts", "ids", "draws"):
        np.testing.assert_array_equal(getattr(found, name), getattr(entries, name))
    if estimator != "sampled":
        np.testing.assert_allclose(found.p, entries.p, rtol=0.51 * STEP, atol=1e-13)
    if record:
        with pytest.raises(ValueError, match=r"record|buffer"):
            decode(record[:-1], rows, entries.head_mass, entries.entropy, estimator, vocabulary)


@pytest.mark.parametrize("token", [0, 2**16, 2**18 + 1, 2**20, 2**24 - 1])
def test_ids_reach_beyond_any_vocabulary_in_use(token):
    entries = estimate(log_probs(1, 10, 0), "top-k", {"k": 1}, np.empty((1, 0)))
    entries.ids[0] = token
    record = encode(entries, "top-k", 2**24)
    assert decode(record, 1, entries.head_mass, entries.entropy, "top-k", 2**24).ids[0] == token
