"""Soft labels in a trimmed vocabulary, against dense references; the report; the lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seodang.corpus.sequences import observed_tokens
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore
from seodang.student.losses import sparse_kd_loss
from seodang.student.trim_labels import trim_sequence, trimmed_lengths, trimming_report
from seodang.student.trimmed import TrimmedVocabulary
from tiny_store import PARAMETERS, config_of, dense, sequences, synthetic_store

# Synthetic: of 12 ids, 0 to 4 stay; the others are spelled with them, 11 has no text.
SPELLINGS: dict[int, list[int]] = {
    **{i: [i] for i in range(5)},
    5: [0, 1],
    6: [0, 1, 2],
    7: [0, 2],
    8: [3, 3],
    9: [0, 1, 3, 4],
    10: [1, 0],
    11: [],
}


def vocabulary_of(spellings: dict[int, list[int]], repeat: int = 1) -> TrimmedVocabulary:
    """A vocabulary from the pieces of every old id; ``repeat`` copies of it side by side."""
    size = sum(len(pieces) == 1 for pieces in spellings.values())
    rows = [
        [piece + size * copy for piece in spellings[old]]
        for copy in range(repeat)
        for old in sorted(spellings)
    ]
    kept = [old for old, pieces in enumerate(rows) if len(pieces) == 1]
    return TrimmedVocabulary(
        np.array(kept, np.int32),
        np.concatenate([[0], np.cumsum([len(pieces) for pieces in rows])]),
        np.array([piece for pieces in rows for piece in pieces], np.int32),
    )


SMALL = vocabulary_of(SPELLINGS)
LARGE = vocabulary_of(SPELLINGS, 20)  # of 240 old ids, 100 new ones


def store_of(path: Path, estimator: str, seed: int = 0) -> SoftLabelStore:
    """Random labels of random tokens that have a text."""
    items = sequences(12, seed=seed, vocabulary=240)
    rng = np.random.default_rng(seed)
    written = np.flatnonzero(LARGE.lengths > 0)
    items = [
        replace(s, token_ids=rng.choice(written, len(s.token_ids)).astype("i4")) for s in items
    ]
    return SoftLabelStore(
        synthetic_store(path, config_of(estimator, seed=seed), items, vocabulary=240)
    )


def matrix(sequence: SoftLabelSequence, size: int) -> np.ndarray:
    """The labels of every position as weights over the vocabulary, (T, size)."""
    return dense(np.diff(sequence.offsets), sequence.ids, sequence.weights, size)


def first_piece_map(vocabulary: TrimmedVocabulary) -> np.ndarray:
    """The map (old, new) of probabilities to those of first pieces."""
    out = np.zeros((vocabulary.old_size, vocabulary.size))
    written = np.flatnonzero(vocabulary.first >= 0)
    out[written, vocabulary.first[written]] = 1.0
    return out


def reference_inside(p_V: np.ndarray, observed: int, depth: int) -> np.ndarray:
    """The label after ``depth`` pieces of an observed token, as the module's formula says."""
    written = SPELLINGS[observed]
    out = np.zeros(5)
    out[written[depth]] = 1.0
    going_on = [
        old
        for old, pieces in SPELLINGS.items()
        if pieces[:depth] == written[:depth] and len(pieces) > depth
    ]
    scale = 1.0 / max(1.0, p_V[going_on].sum())
    for old in going_on:
        out[SPELLINGS[old][depth]] += scale * p_V[old]
        out[written[depth]] -= scale * p_V[old]
    return out


@pytest.mark.parametrize("estimator", PARAMETERS)
def test_labels_are_mapped_to_first_pieces(tmp_path: Path, estimator: str) -> None:
    store = store_of(tmp_path / "store", estimator)
    push = first_piece_map(LARGE)
    for old in store:
        new = trim_sequence(old, LARGE)
        spelled, last = LARGE.spell_out(old.token_ids)
        assert np.array_equal(new.token_ids, spelled)
        assert new.document_id == old.document_id
        expected = matrix(old, 240)[old.labelled] @ push
        found = matrix(new, 100)
        np.testing.assert_allclose(found[last[old.labelled]], expected, atol=1e-6)
        inside = np.setdiff1d(new.labelled, last[old.labelled])
        np.testing.assert_allclose(found[inside].sum(1), 1.0, atol=1e-6)
        unlabelled = np.setdiff1d(np.arange(len(spelled)), new.labelled)
        assert not found[unlabelled].any()
        for start, stop in zip(new.offsets[:-1], new.offsets[1:], strict=True):
            assert len(set(new.ids[start:stop].tolist())) == stop - start
        assert new.token_ids.dtype == new.ids.dtype == new.labelled.dtype == np.int32
        assert new.weights.dtype == np.float32


@pytest.mark.parametrize("estimator", PARAMETERS)
def test_every_piece_of_a_labelled_token_is_labelled(tmp_path: Path, estimator: str) -> None:
    store = store_of(tmp_path / "store", estimator)
    tokens, labelled = trimmed_lengths(store, LARGE)
    for number, old in enumerate(store):
        new = trim_sequence(old, LARGE)
        assert (len(new.token_ids), len(new.labelled)) == (tokens[number], labelled[number])
        assert (np.diff(new.labelled) > 0).all()
        observed = [int(i) for i in observed_tokens(old) if i >= 0]
        written = [piece for i in observed for piece in LARGE.spell_out(np.array([i]))[0].tolist()]
        assert [int(i) for i in observed_tokens(new) if i >= 0] == written


def sequence_of(p_V: np.ndarray, observed: int, store: SoftLabelStore) -> SoftLabelSequence:
    """Token 4, then ``observed``; the first position is labelled with ``p_V``."""
    ids = np.flatnonzero(p_V).astype(np.int32)
    return replace(
        store[0],
        token_ids=np.array([4, observed], np.int32),
        labelled=np.array([0], np.int32),
        offsets=np.array([0, len(ids), len(ids)]),
        ids=ids,
        weights=p_V[ids].astype(np.float32),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SoftLabelStore:
    return store_of(tmp_path_factory.mktemp("labels") / "store", "head-tail")


weights = st.lists(st.floats(0, 0.5, width=32), min_size=12, max_size=12)


@given(p=weights, observed=st.integers(0, 10))
def test_labels_inside_a_token_follow_the_formula(
    store: SoftLabelStore, p: list[float], observed: int
) -> None:
    p_V = np.array(p)  # which may sum to more than 1, as drawn weights do
    found = matrix(trim_sequence(sequence_of(p_V, observed, store), SMALL), 5)
    np.testing.assert_allclose(found[0], p_V @ first_piece_map(SMALL), atol=1e-6)
    for depth in range(1, len(SPELLINGS[observed])):
        expected = reference_inside(p_V, observed, depth)
        np.testing.assert_allclose(found[depth], expected, atol=2e-6)
        assert (found[depth] >= 0).all()
    assert len(found) == 1 + len(SPELLINGS[observed])


def test_text_of_the_teacher_gives_its_own_next_piece(store: SoftLabelStore) -> None:
    p_V = np.random.default_rng(0).dirichlet(np.ones(11))
    for prefix in ([0], [0, 1], [3], [0, 1, 3]):
        depth = len(prefix)
        goes_on = [
            old for old in range(11)
            if SPELLINGS[old][:depth] == prefix and len(SPELLINGS[old]) > depth
        ]  # fmt: skip
        truth = np.zeros(5)
        mean = np.zeros(5)
        for old in goes_on:
            share = p_V[old] / p_V[goes_on].sum()
            truth[SPELLINGS[old][depth]] += share
            label = matrix(trim_sequence(sequence_of(np.append(p_V, 0), old, store), SMALL), 5)
            mean += share * label[depth]
        np.testing.assert_allclose(mean, truth, atol=1e-6)


def test_a_sure_teacher_needs_no_observed_piece(store: SoftLabelStore) -> None:
    p_V = np.zeros(12)
    p_V[[5, 7]] = 0.25, 0.75  # 0 1 and 0 2: after 0, the teacher knows what follows
    for observed in (5, 7):
        found = matrix(trim_sequence(sequence_of(p_V, observed, store), SMALL), 5)
        np.testing.assert_allclose(found[1], [0, 0.25, 0.75, 0, 0], atol=1e-6)


def test_ids_without_a_text_are_left_out_and_reported(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", "sampled")
    report = trimming_report(store, LARGE)
    old = np.zeros(240)
    for sequence in store:
        old += matrix(sequence, 240).sum(0)
    tokens = np.concatenate([s.token_ids for s in store])
    assert report["entries"] == 100
    assert report["of"] == 240
    assert report["lost_mass"] == pytest.approx(old[11::12].sum() / old.sum(), abs=1e-6)
    assert report["lost_mass"] > 0
    moved = (LARGE.lengths > 1).nonzero()[0]
    assert report["moved_mass"] == pytest.approx(old[moved].sum() / old.sum(), abs=1e-6)
    assert report["spelled_out"] == pytest.approx(np.isin(tokens, moved).mean())
    new = sum(len(trim_sequence(s, LARGE).token_ids) for s in store)
    assert report["growth"] == pytest.approx(new / len(tokens))
    bad = replace(store[0], token_ids=np.full_like(store[0].token_ids, 11))
    with pytest.raises(ValueError, match="the id 11 has no text"):
        trim_sequence(bad, LARGE)


def test_nothing_changes_but_ids_where_everything_is_kept(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", "head-tail")
    size = 240
    identity = TrimmedVocabulary(
        np.arange(size, dtype=np.int32), np.arange(size + 1), np.arange(size, dtype=np.int32)
    )
    for old in store:
        new = trim_sequence(old, identity)
        for name in ("token_ids", "labelled", "offsets", "ids", "weights"):
            assert np.array_equal(getattr(new, name), getattr(old, name)), name


@pytest.mark.parametrize("estimator", PARAMETERS)
def test_the_loss_of_trimmed_labels(tmp_path: Path, estimator: str) -> None:
    sequence = trim_sequence(store_of(tmp_path / "store", estimator)[1], LARGE)
    counts = np.diff(sequence.offsets)[sequence.labelled]
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(len(counts), 8, generator=g), torch.randn(100, 8, generator=g)
    loss = sparse_kd_loss(
        hidden,
        head,
        torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
        torch.from_numpy(sequence.ids),
        torch.from_numpy(sequence.weights),
        residual=estimator == "residual",
        reduction="sum",
    )
    log_q = torch.log_softmax((hidden @ head.T).double(), -1).numpy()
    w = matrix(sequence, 100)[sequence.labelled]
    expected = -(w * log_q).sum()
    if estimator == "residual":
        rest = 1 - w.sum(1)
        q = (np.exp(log_q) * (w != 0)).sum(1)
        expected -= np.where(rest > 1e-6, rest * np.log1p(-q), 0.0).sum()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_windows_without_spelled_out_or_labelled_tokens(store: SoftLabelStore) -> None:
    nothing = replace(
        store[0],
        token_ids=np.array([5, 6], np.int32),
        labelled=np.array([1], np.int32),
        offsets=np.array([0, 0, 1]),
        ids=np.array([11], np.int32),
        weights=np.array([1.0], np.float32),
    )
    found = trim_sequence(nothing, SMALL)
    assert found.labelled.tolist() == [4]  # the last piece; what follows it was not observed
    assert found.offsets.tolist() == [0] * 6
