"""n-gram overlap: hashes against sets of words, and the guarantee for what is held out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from seodang.corpus.raw.overlap import Contamination, HeldOutIndex, ngram_hashes, normal_words

WORDS = st.lists(st.sampled_from(["가", "나", "다", "라", "the", "of", "A"]), max_size=40)


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = normal_words(text)
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}


def jaccard(a: str, b: str, n: int) -> float:
    first, second = ngrams(a, n), ngrams(b, n)
    return len(first & second) / max(1, len(first | second))


@given(WORDS, WORDS, st.integers(1, 6))
def test_hashes_are_equal_where_ngrams_are(a: list[str], b: list[str], n: int) -> None:
    first, second = " ".join(a), ", ".join(b)
    both = set(ngram_hashes(first, n).tolist()) & set(ngram_hashes(second, n).tolist())
    assert len(ngram_hashes(first, n)) == len(ngrams(first, n))
    assert len(both) == len(ngrams(first, n) & ngrams(second, n))


@given(WORDS, WORDS, st.sampled_from([0.3, 0.5, 0.8]))
def test_no_pair_as_similar_as_the_threshold_is_missed(
    a: list[str], b: list[str], threshold: float
) -> None:
    held_out, document = " ".join(a), " ".join(b)
    index = HeldOutIndex(3, threshold)
    index.add("완전히 다른 문서 하나가 먼저 있다")
    index.add(held_out)
    if ngrams(held_out, 3) and jaccard(held_out, document, 3) >= threshold:
        assert index.repeats(document)
    shared = len(ngrams(held_out, 3) & ngrams(document, 3))
    if ngrams(held_out, 3) and ngrams(document, 3):
        expected = shared >= threshold * len(ngrams(held_out, 3))
        assert index.repeats(document) == expected


def test_a_held_out_document_inside_a_longer_one_is_found() -> None:
    index = HeldOutIndex(5, 0.5)
    index.add("보류한 문서의 내용은 다른 문서 안에 그대로 들어 있을 수 있다")
    long = (
        "앞 " * 500 + "보류한 문서의 내용은 다른 문서 안에 그대로 들어 있을 수 있다" + " 뒤" * 500
    )
    assert index.repeats(long)
    assert not index.repeats("앞 " * 500)
    assert not HeldOutIndex(5, 0.5).repeats(long)


def test_short_documents_are_compared_as_a_whole() -> None:
    index = HeldOutIndex(5, 0.5)
    index.add("짧은 글")
    assert index.repeats("짧은, 글!")
    assert not index.repeats("다른 글")


def test_contamination_is_found_whatever_the_case_and_punctuation() -> None:
    question = "Natalia sold clips to 48 of her friends in April and then half as many in May"
    found = Contamination(13)
    found.add("sums", iter([question, "too short to be found"]))
    found.add("nothing", iter([]))
    assert found.records == {"sums": 1, "nothing": 0}
    inside = f"As a blog has it: “{question.upper()}!”"
    assert found.benchmark_of(inside) == "sums"
    assert found.benchmark_of(" ".join(question.split()[:12])) is None
    assert found.benchmark_of("too short to be found") is None


def test_a_run_of_numbers_is_nobodys() -> None:
    numbers = " ".join(map(str, range(40)))
    found = Contamination(13)
    found.add("sums", iter([f"What comes next: {numbers}?"]))
    assert found.benchmark_of(numbers) is None
    assert found.benchmark_of(f"asked what comes next {numbers}") is None
    found.add("words", iter(["one and two and 3 and 4 and 5 and 6 and 7 and 8 and 9"]))
    assert found.benchmark_of("one and two and 3 and 4 and 5 and 6 and 7") == "words"
