"""Records: what either layout packs comes back, for any counts, ids and codes."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from seodang.errors import InputError
from seodang.softlabels.entropy_coding import (
    EntropyModel,
    frequent_ids,
    ids_from_text,
    ids_to_text,
    rank_ids,
    symbols,
)
from seodang.softlabels.planes import Planes
from seodang.softlabels.shards import shard_bytes
from tiny_store import config_of, header_of

VOCABULARIES = [1, 2, 2**16, 2**16 + 1, 2**18, 2**18 + 1, 2**20, 2**24 - 1, 2**24]
LEVELS = [2, 13, 51, 64, 65, 256]  # of codes: 1, 4, 6, 6, 7 and 8 bits


def distinct(rng, vocabulary, count):
    """``count`` distinct ids, those at the ends of the vocabulary among them where they fit."""
    few = {0, vocabulary - 1} if count > 1 else {vocabulary - 1} if count else set()
    while len(few) < count:
        few.update(rng.integers(0, vocabulary, count - len(few)).tolist())
    return rng.permutation(list(few)[:count])


def random_sequence(rng, positions, vocabulary, num_levels, most):
    """Counts, ids, codes and entropy of one sequence: arbitrary, and empty where counts are 0."""
    counts = rng.integers(0, min(most, vocabulary) + 1, positions)
    counts[rng.random(positions) < 0.3] = 0
    ids = [distinct(rng, vocabulary, count) for count in counts]
    codes = rng.integers(0, num_levels, counts.sum()).astype(np.uint8)
    entropy = np.rint(16 * rng.exponential(3, positions)).astype(np.float32) / 16
    nothing = np.empty(0, np.int64)
    return counts.astype(np.int64), np.concatenate([nothing, *ids]).astype(np.int32), codes, entropy


def by_id(counts, ids, codes):
    """The entries of each position in the order of their ids: positions keep no other."""
    order = np.lexsort((ids, np.repeat(np.arange(len(counts)), counts)))
    return counts.tolist(), ids[order].tolist(), codes[order].tolist()


sequences_of = {
    "positions": st.sampled_from([0, 1, 2, 7, 60]),
    "vocabulary": st.sampled_from(VOCABULARIES),
    "num_levels": st.sampled_from(LEVELS),
    "most": st.sampled_from([0, 1, 5, 40]),
    "seed": st.integers(0, 2**32),
}


@settings(deadline=None, max_examples=150)
@given(**sequences_of)
def test_planes_give_back_what_was_packed(positions, vocabulary, num_levels, most, seed):
    rng = np.random.default_rng(seed)
    counts, ids, codes, _ = random_sequence(rng, positions, vocabulary, num_levels, most)
    planes = Planes(vocabulary, num_levels)
    record = planes.encode(counts, ids, codes)
    assert len(record) == planes.size(positions, len(ids))
    found = planes.decode(np.frombuffer(record, np.uint8), positions)
    for one, other in zip(found, (counts, ids, codes), strict=True):
        np.testing.assert_array_equal(one, other)
    assert found[1].dtype == np.int32


@pytest.mark.parametrize(
    ("vocabulary", "num_levels", "entry_bytes"),
    [(2**16, 256, 3), (2**18, 64, 3), (2**18 + 1, 64, 4), (2**16 + 1, 129, 4), (2**24, 2, 4)],
)
def test_an_entry_takes_three_bytes_while_code_and_high_bits_share_one(
    vocabulary, num_levels, entry_bytes
):
    assert Planes(vocabulary, num_levels).entry_bytes == entry_bytes


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([2**16, 2**20]))
def test_planes_of_another_length_are_refused(seed, vocabulary):
    rng = np.random.default_rng(seed)
    counts, ids, codes, _ = random_sequence(rng, 4, vocabulary, 64, 5)
    planes = Planes(vocabulary, 64)
    record = np.frombuffer(planes.encode(counts, ids, codes), np.uint8)
    longer = [np.append(record, np.zeros(n, np.uint8)) for n in (1, planes.entry_bytes)]
    for changed in (record[:-1], *longer, record[:6]):
        with pytest.raises(ValueError, match=r"not that of its planes|dtype"):
            planes.decode(changed, 4)


def coded(sequences, vocabulary, num_levels):
    """The model and the records of a shard of these sequences, as `shard_bytes` makes them."""
    made = [symbols(counts, ids, codes, entropy) for counts, ids, codes, entropy in sequences]
    model = EntropyModel.fit(made, num_levels)
    return model, [np.frombuffer(model.encode(one), np.uint8) for one in made]


@settings(deadline=None, max_examples=120)
@given(**sequences_of, count=st.integers(1, 3))
def test_entropy_coding_gives_back_what_was_packed(
    positions, vocabulary, num_levels, most, seed, count
):
    """Ranks stand for ids here; a reader has the frequencies from the text in the metadata."""
    rng = np.random.default_rng(seed)
    sequences = [
        random_sequence(rng, positions, vocabulary, num_levels, most) for _ in range(count)
    ]
    model, records = coded(sequences, vocabulary, num_levels)
    reader = EntropyModel.from_text(model.to_text(), num_levels)
    for (counts, ranks, codes, entropy), record in zip(sequences, records, strict=True):
        found = reader.decode(record, entropy)
        assert by_id(*found) == by_id(counts, ranks, codes)
        within = np.diff(found[1])[np.diff(np.repeat(np.arange(positions), counts)) == 0]
        assert (within > 0).all()  # by rising rank


def test_a_position_of_thousands_of_entries_beside_positions_of_none():
    rng = np.random.default_rng(5)
    counts = np.array([0, 3000, 0, 63, 64, 62, 1], np.int64)
    ids = np.concatenate([distinct(rng, 163_840, count) for count in counts]).astype(np.int32)
    codes = rng.integers(0, 64, len(ids)).astype(np.uint8)
    entropy = np.linspace(0, 12, len(counts)).astype(np.float32)
    planes = Planes(163_840, 64)
    record = np.frombuffer(planes.encode(counts, ids, codes), np.uint8)
    assert by_id(*planes.decode(record, len(counts))) == by_id(counts, ids, codes)
    model, (record,) = coded([(counts, ids, codes, entropy)], 163_840, 64)
    assert by_id(*model.decode(record, entropy)) == by_id(counts, ids, codes)


def test_the_largest_count_that_a_record_holds():
    counts = np.array([65535, 0], np.int64)
    ids = np.arange(65535, dtype=np.int32)
    codes = (ids % 64).astype(np.uint8)
    planes = Planes(2**17, 64)
    record = np.frombuffer(planes.encode(counts, ids, codes), np.uint8)
    assert by_id(*planes.decode(record, 2)) == by_id(counts, ids, codes)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2**24 - 1), max_size=300, unique=True))
def test_a_list_of_ids_survives_as_text(ids):
    ids = np.array(ids, np.int32)
    np.testing.assert_array_equal(ids_from_text(ids_to_text(ids)), ids)


@pytest.mark.parametrize("text", ["", "3", "3 ????", "2 " + "AAAA" * 5, "x AAAA"])
def test_text_that_was_not_written_is_refused(text):
    with pytest.raises(ValueError, match=r"statistics|invalid literal"):
        ids_from_text(text)
    with pytest.raises(ValueError, match="statistics"):
        EntropyModel.from_text(text, 64)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(0, 2**32))
def test_ranks_are_a_permutation_that_puts_the_frequent_first(vocabulary, seed):
    rng = np.random.default_rng(seed)
    entries = (vocabulary * rng.random(rng.integers(0, 2000)) ** 3).astype(np.int32)
    tokens = rng.integers(0, vocabulary, rng.integers(0, 500)).astype(np.int32)
    frequent = frequent_ids(entries)
    assert len(set(frequent.tolist())) == len(frequent)
    rank_of_id, id_of_rank = rank_ids(frequent, tokens, vocabulary)
    np.testing.assert_array_equal(id_of_rank[rank_of_id], np.arange(vocabulary))
    np.testing.assert_array_equal(id_of_rank[: len(frequent)], frequent)
    rest = np.bincount(tokens, minlength=vocabulary)[id_of_rank[len(frequent) :]]
    assert (np.diff(rest) <= 0).all()
    often = np.bincount(entries, minlength=vocabulary)[frequent]
    classes = np.floor(np.log2(np.arange(1, len(frequent) + 1)))
    for one, following in pairwise(often):
        assert one > 0
        assert following > 0
    for number in range(int(classes.max(initial=-1))):  # a class is above the ones that follow
        assert often[classes == number].min() >= often[classes == number + 1].max()


def test_records_get_smaller_with_what_can_be_foreseen():
    """Frequent ids and frequent codes cost less: the point of the layout."""
    rng = np.random.default_rng(0)
    counts = np.full(400, 4, np.int64)
    entropy = np.ones(400, np.float32)
    codes = rng.integers(0, 64, 1600).astype(np.uint8)
    flat = [distinct(rng, 2**16, 4) for _ in range(400)]
    skewed = [distinct(rng, 60, 4) for _ in range(400)]
    sizes = []
    for ids, chosen in ((flat, codes), (skewed, codes), (skewed, codes % 2)):
        one = counts, np.concatenate(ids).astype(np.int32), chosen, entropy
        _, (record,) = coded([one], 2**16, 64)
        sizes.append(len(record))
    assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2]


@pytest.mark.parametrize("layout", ["fast", "small"])
def test_a_vocabulary_beyond_24_bits_is_refused(layout):
    shard_bytes(header_of(config_of("sampled", layout="fast"), 2**24), [], [])
    with pytest.raises(InputError, match=r"16777217 ids is beyond the record's 2\^24"):
        shard_bytes(header_of(config_of("sampled", layout=layout), 2**24 + 1), [], [])
