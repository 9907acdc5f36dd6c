"""Near-duplicates stay together, and sides are stable: checked by comparing every pair."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seodang.corpus.documents import Document, content_id
from seodang.corpus.split import clusters, comparable, shingles, split, without_duplicates
from seodang.errors import InputError


def document(text: str) -> Document:
    return Document(content_id({"text": text}), "s", "MIT", "synthetic", text=text)


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of three-word runs, written independently of the code under test."""
    runs_a, runs_b = (
        {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        for words in (a.split(), b.split())
    )
    return len(runs_a & runs_b) / len(runs_a | runs_b)


words = st.sampled_from([f"w{i}" for i in range(12)])


@st.composite
def corpora(draw: st.DrawFn) -> list[str]:
    """Synthetic documents, and copies of them with words replaced, inserted and deleted."""
    texts = draw(st.lists(st.lists(words, min_size=1, max_size=40), min_size=2, max_size=8))
    for original in list(texts):
        for _ in range(draw(st.integers(0, 3))):
            copy = list(original)
            for _ in range(draw(st.integers(1, 4))):
                at = draw(st.integers(0, len(copy)))
                copy[at : at + draw(st.integers(0, 1))] = draw(st.lists(words, max_size=1))
            texts.append(copy or ["w0"])
    return list(dict.fromkeys(" ".join(text) for text in draw(st.permutations(texts))))


@given(corpora(), st.sampled_from([0.2, 0.5, 0.7, 0.9, 1.0]), st.floats(0.05, 0.95))
@settings(max_examples=150, deadline=None)
def test_near_duplicates_never_straddle_the_split(
    texts: list[str], threshold: float, held_out: float
) -> None:
    groups = clusters([document(text) for text in texts], threshold)
    assert sorted(d.text for group in groups for d in group.documents) == sorted(texts)
    for a, b in itertools.combinations(groups, 2):
        for one, other in itertools.product(a.documents, b.documents):
            assert similarity(one.text, other.text) < threshold
    if len(groups) > 1:
        sides = split(groups, held_out)
        assert set(sides.values()) == {"train", "held_out"}
        assert sides.keys() == {group.digest for group in groups}


@given(corpora(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_clusters_do_not_depend_on_the_order_of_documents(texts: list[str], random) -> None:
    documents = [document(text) for text in texts]
    shuffled = random.sample(documents, len(documents))
    assert clusters(documents, 0.7) == clusters(shuffled, 0.7)


def test_a_cluster_hangs_together_by_chains() -> None:
    first = " ".join(f"a{i}" for i in range(30))
    second = first.replace("a29", "b29").replace("a28", "b28")
    third = second.replace("a0", "b0").replace("a1 ", "b1 ")
    assert similarity(first, second) >= 0.8
    assert similarity(second, third) >= 0.8
    assert similarity(first, third) < 0.8
    for order in itertools.permutations((first, second, third)):
        assert len(clusters([document(text) for text in order], 0.8)) == 1
    assert len(clusters([document(first), document(third)], 0.8)) == 2


def test_sides_stay_when_documents_are_added() -> None:
    old = [document(f"document number {i} of the first delivery " * 3) for i in range(200)]
    new = [document(f"another text {i} that came later on " * 3) for i in range(300)]
    before = split(clusters(old, 0.99), 0.2)
    after = split(clusters(new + old, 0.99), 0.2)
    assert len(before) == 200
    assert {digest: after[digest] for digest in before} == before
    assert 0.1 < list(after.values()).count("held_out") / len(after) < 0.3


def test_both_sides_get_a_cluster_or_the_corpus_is_too_small() -> None:
    groups = clusters([document("one"), document("two"), document("three")], 0.7)
    for held_out in (1e-9, 1 - 1e-9):
        assert set(split(groups, held_out).values()) == {"train", "held_out"}
    with pytest.raises(InputError, match="too small"):
        split(groups[:1], 0.5)


def test_exact_duplicates_differ_in_case_and_spacing_only() -> None:
    kept = without_duplicates(map(document, ["A  card", "a\ncard ", "a card!", "ACARD"]))
    assert [d.text for d in kept] == ["A  card", "a card!", "ACARD"]
    chat = Document("c", "s", "MIT", "o", messages=[{"role": "user", "content": "A card"}])
    assert comparable(chat) == comparable(document("a card"))


def test_shingles_of_short_and_unspaced_texts() -> None:
    assert shingles("One, two; THREE four") == {"one two three", "two three four"}
    assert shingles("two words") == {"two words"}
    assert shingles("銀行口座の") == {"銀 行 口", "行 口 座", "口 座 の"}
    assert shingles("📶 !!") == {"📶 !!"}
