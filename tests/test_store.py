"""The store: what was written is what is read, whichever layout, shard and order."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from seodang.artifact import Artifact, Draft
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError
from seodang.softlabels import open as open_store
from seodang.softlabels.estimators import Entries
from seodang.softlabels.shards import ENTROPY_STEP, HEAD_MASS_STEP, SCHEMA, write_shard
from seodang.softlabels.store import OPEN_SHARDS, SoftLabelStore, shard_name
from tiny_store import (
    LAYOUTS,
    PARAMETERS,
    config_of,
    header_of,
    random_labels,
    sequences,
    synthetic_store,
)

VOCABULARY = 500


def as_sets(sequence):
    """The (id, weight) pairs of each position, without an order."""
    bounds = sequence.offsets
    return [
        set(zip(sequence.ids[a:b].tolist(), sequence.weights[a:b].tolist(), strict=True))
        for a, b in pairwise(bounds)
    ]


def written_sets(item, entries):
    """The same of what was written."""
    bounds = np.concatenate([[0], np.cumsum(entries.counts)])
    out = [set() for _ in item.token_ids]
    weights = entries.weights.astype(np.float32).tolist()
    for position, a, b in zip(item.labelled, bounds, bounds[1:], strict=False):
        out[position] = set(zip(entries.ids[a:b].tolist(), weights[a:b], strict=True))
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", list(PARAMETERS))
def test_every_sequence_is_read_as_it_was_written(tmp_path, estimator, layout):
    config, items = config_of(estimator, layout=layout), sequences(25)
    artifact = synthetic_store(tmp_path / "s", config, items, shard_size=7)
    store = open_store(tmp_path / "s")
    assert (store.estimator, store.vocab_size, len(store)) == (estimator, VOCABULARY, 25)
    assert store.num_tokens == sum(len(item.labelled) for item in items)
    assert store.header == header_of(config)
    assert store.artifact.digest == artifact.digest
    assert store.verify() == []
    for item, found in zip(items, store, strict=True):
        assert (found.document_id, found.digest) == (item.document_id, item.digest)
        np.testing.assert_array_equal(found.token_ids, item.token_ids)
        np.testing.assert_array_equal(found.labelled, item.labelled)
        entries = random_labels(config, item, VOCABULARY)
        assert as_sets(found) == written_sets(item, entries)
        assert [a.dtype for a in (found.token_ids, found.labelled, found.ids)] == [np.int32] * 3
        assert (found.offsets.dtype, found.weights.dtype) == (np.int64, np.float32)
        assert found.offsets.shape == (len(item.token_ids) + 1,)
        np.testing.assert_allclose(found.entropy, entries.entropy, atol=ENTROPY_STEP / 2 + 1e-6)
        np.testing.assert_allclose(
            found.head_mass, entries.head_mass, atol=HEAD_MASS_STEP / 2 + 1e-6
        )


def test_both_layouts_hold_the_same_labels_and_small_is_smaller(tmp_path):
    items = sequences(40)
    fast, small = (
        synthetic_store(tmp_path / layout, config_of("head-tail", layout=layout), items)
        for layout in LAYOUTS
    )
    for one, other in zip(SoftLabelStore(fast), SoftLabelStore(small), strict=True):
        assert as_sets(one) == as_sets(other)
        assert one.digest == other.digest
        np.testing.assert_array_equal(one.entropy, other.entropy)
    records = [
        sum(len(r.as_py()) for r in pq.read_table(a.path / shard_name(0))["record"])
        for a in (fast, small)
    ]
    assert records[1] < 0.8 * records[0]


@settings(deadline=None, max_examples=25)
@given(
    layout=st.sampled_from(LAYOUTS),
    estimator=st.sampled_from(list(PARAMETERS)),
    vocabulary=st.sampled_from([1, 2, 300, 70_000, 300_000]),
    counts=st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=6),
    shard_size=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_any_entries_survive(
    tmp_path_factory, layout, estimator, vocabulary, counts, shard_size, seed
):
    """Sequences of zero positions, positions without entries, ids at the ends of the vocabulary."""
    rng = np.random.default_rng(seed)
    config = config_of(estimator, layout=layout)
    grid = header_of(config).levels()
    items, entries = [], []
    for number, wanted in enumerate(counts):
        row = np.minimum(wanted, vocabulary).astype(np.int64)
        tokens = rng.integers(0, vocabulary, len(row) + number).astype(np.int32)
        positions = np.sort(rng.permutation(len(tokens))[: len(row)]).astype(np.int32)
        items.append(TokenSequence(f"d{number}", tokens, positions))
        chosen = [rng.choice(min(vocabulary, 10), n, replace=False) for n in row]
        ids = [np.where(c % 2, vocabulary - 1 - c, c) if vocabulary > 20 else c for c in chosen]
        entries.append(
            Entries(
                row,
                np.concatenate([np.empty(0, int), *ids]).astype(np.int32),
                rng.choice(grid, row.sum()),
                rng.random(len(row)).astype(np.float32),
                rng.exponential(2, len(row)).astype(np.float32),
            )
        )
    path = tmp_path_factory.mktemp("any") / "store"
    synthetic_store(
        path, config, items, entries=entries, shard_size=shard_size, vocabulary=vocabulary
    )
    store = open_store(path)
    assert store.verify() == []
    for item, made, found in zip(items, entries, store, strict=True):
        np.testing.assert_array_equal(found.token_ids, item.token_ids)
        np.testing.assert_array_equal(found.labelled, item.labelled)
        assert as_sets(found) == written_sets(item, made)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opening_reads_the_manifest_and_one_shard(tmp_path, layout):
    """All other shards are away: they can't have been read."""
    items = sequences(240, longest=6)
    synthetic_store(tmp_path / "s", config_of("sampled", layout=layout), items, shard_size=2)
    whole = open_store(tmp_path / "s")
    before = [whole[i].digest for i in (0, 1, 198, 199)]
    for number in range(1, 120):
        if number != 99:
            (tmp_path / "s" / shard_name(number)).rename(tmp_path / f"away-{number}")
    store = open_store(tmp_path / "s")
    assert len(store) == 240
    assert store.num_tokens == sum(len(item.labelled) for item in items)
    # And reading a sequence reads its own shard.
    assert [store[i].digest for i in (0, 1, 198, 199)] == before
    with pytest.raises(InputError, match=r"labels-00098\.parquet: cannot be read"):
        store[197]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_access_across_more_shards_than_stay_open(tmp_path, layout, monkeypatch):
    monkeypatch.setitem(OPEN_SHARDS, layout, 5)
    shards = 25
    items = sequences(shards, longest=7)
    synthetic_store(tmp_path / "s", config_of("sampled", layout=layout), items, shard_size=1)
    store = open_store(tmp_path / "s")
    order = np.random.default_rng().permutation(2 * shards) % shards
    for index in order.tolist():
        assert store[index].digest == items[index].digest
    np.testing.assert_array_equal(store.lengths, [len(item.token_ids) for item in items])
    np.testing.assert_array_equal(store.labelled_counts, [len(item.labelled) for item in items])
    assert store[-1].digest == items[-1].digest
    for beyond in (shards, -shards - 1):
        with pytest.raises(IndexError):
            store[beyond]


def test_any_reader_of_parquet_sees_the_columns(tmp_path):
    items = sequences(5)
    for layout in LAYOUTS:
        synthetic_store(tmp_path / layout, config_of("head-tail", layout=layout), items)
        shard = tmp_path / layout / shard_name(0)
        table = pq.read_table(shard)
        assert table.schema.equals(SCHEMA)
        assert table["document_id"].to_pylist() == [item.document_id for item in items]
        assert table["token_ids"].to_pylist() == [item.token_ids.tolist() for item in items]
        assert table["labelled"].to_pylist() == [item.labelled.tolist() for item in items]
        assert table["sequence_digest"].to_pylist() == [item.digest for item in items]
        stored = [found.entropy.tolist() for found in open_store(tmp_path / layout)]
        assert table["entropy"].to_pylist() == stored
        assert b'"estimator":"head-tail"' in pq.read_metadata(shard).metadata[b"seodang"]


def test_a_shard_may_have_no_row(tmp_path):
    """All of its documents were left out."""
    for layout in LAYOUTS:
        config, items = config_of("head-tail", layout=layout), sequences(4)
        synthetic_store(tmp_path / layout, config, items, shard_size=2)
        path = tmp_path / layout
        path.joinpath("manifest.json").unlink()
        write_shard(path / shard_name(1), header_of(config), [], [])
        tokens = sum(len(item.labelled) for item in items[:2])
        Draft(path, "soft-labels", {}, {}).finish(summary={"tokens": tokens, "rows": [2, 0]})
        store = open_store(path)
        assert [s.digest for s in store] == [item.digest for item in items[:2]]
        assert store.verify() == []
        assert len(store.lengths) == len(store.labelled_counts) == 2


def rewrite(path, items, entries, config, **summary):
    """A shard and the manifest that vouches for it, made anew as a careless tool would."""
    manifest = Artifact.open(path).manifest
    (path / "manifest.json").unlink()
    write_shard(path / shard_name(0), header_of(config), items, entries)
    draft = Draft(path, manifest.kind, manifest.config, manifest.inputs)
    return draft.finish(summary={**manifest.summary, **summary})


def shifted(item):
    """The labels of an item as if they belonged to the tokens one further on."""

    class Other(TokenSequence):
        digest = item.digest

    return Other(item.document_id, np.roll(item.token_ids, 1), item.labelled)


def moved(item):
    class Other(TokenSequence):
        digest = item.digest

    return Other(item.document_id, item.token_ids, item.labelled - 1)


@pytest.mark.parametrize("change", [shifted, moved])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shifted_tokens_or_positions_are_found(tmp_path, layout, change):
    config = config_of("head-tail", layout=layout)
    items = [TokenSequence("d", i.token_ids, i.labelled[1:]) for i in sequences(8)]
    items = [item for item in items if len(item.labelled)]
    entries = [random_labels(config, item, VOCABULARY) for item in items]
    synthetic_store(tmp_path / "s", config, items, entries=entries)
    rewrite(tmp_path / "s", [items[0], change(items[1]), *items[2:]], entries, config)
    (problem,) = open_store(tmp_path / "s").verify()
    assert "sequence 1 of document d" in problem
    assert "digest" in problem


def test_a_manifest_that_counts_otherwise_is_found(tmp_path):
    config, items = config_of("sampled"), sequences(3)
    entries = [random_labels(config, item, VOCABULARY) for item in items]
    synthetic_store(tmp_path / "s", config, items, entries=entries)
    rewrite(tmp_path / "s", items, entries, config, tokens=7)
    (problem,) = open_store(tmp_path / "s").verify()
    assert "the manifest says 7" in problem
    rewrite(tmp_path / "s", items, entries, config, rows=[4])
    with pytest.raises(InputError, match="3 sequences, the manifest says 4"):
        open_store(tmp_path / "s")[0]


@pytest.mark.parametrize("rows", [None, [], ["x"]])
def test_a_store_without_shards_is_refused(tmp_path, rows):
    config, items = config_of("sampled"), sequences(1)
    synthetic_store(tmp_path / "s", config, items)
    rewrite(tmp_path / "s", [], [], config, rows=rows)
    with pytest.raises(InputError, match="without a shard"):
        open_store(tmp_path / "s")


def test_shards_of_other_settings_or_formats_are_refused(tmp_path):
    config, items = config_of("head-tail"), sequences(4)
    synthetic_store(tmp_path / "s", config, items, shard_size=2)
    other = config_of("head-tail", threshold=0.2)
    entries = [random_labels(other, item, VOCABULARY) for item in items[2:]]
    write_shard(tmp_path / "s" / shard_name(1), header_of(other), items[2:], entries)
    with pytest.raises(InputError, match="other settings than shard 0"):
        open_store(tmp_path / "s")[2]
    table = pq.read_table(tmp_path / "s" / shard_name(0))
    pq.write_table(table, tmp_path / "s" / shard_name(0))  # as another tool would
    with pytest.raises(InputError, match=r"labels-00000\.parquet: cannot be read: its footer"):
        open_store(tmp_path / "s")


def test_another_tokenizer_is_refused(tmp_path):
    synthetic_store(tmp_path / "s", config_of("sampled"), sequences(1))
    store = open_store(tmp_path / "s")
    store.check_tokenizer("synthetic")
    with pytest.raises(InputError, match="another tokenizer"):
        store.check_tokenizer("0" * 64)


def test_an_unfinished_store_does_not_open_and_a_moved_one_is_the_same(tmp_path):
    made = synthetic_store(tmp_path / "s", config_of("sampled"), sequences(2))
    (tmp_path / "s").rename(tmp_path / "t")
    assert open_store(tmp_path / "t").artifact.digest == made.digest
    (tmp_path / "t" / "manifest.json").unlink()
    with pytest.raises(InputError, match="not a finished artifact"):
        open_store(tmp_path / "t")
