"""Runs of words that documents share with benchmarks, or with what is held out.

An n-gram is n white-space words in a row, in lower case and without punctuation. A document is
contaminated if it has an n-gram of a benchmark that is not mostly numbers: 13 words, as in GPT-3's
analysis (Brown et al. 2020, appendix C). Documents are compared with what is held out by the share
of the held-out document's n-grams that they have; with the Jaccard similarity J of two documents,
that share is at least J, so no pair that is as similar as the threshold can be missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xxhash
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter

_WORD = re.compile(r"\w+")


def normal_words(text: str) -> list[str]:
    """The words of ``text`` in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def ngram_hashes(text: str, n: int, spoken: bool = False) -> npt.NDArray[np.uint64]:
    """The different n-grams of ``text``, as sorted 64-bit hashes; of a shorter text, none.

    With ``spoken`` only those at least half of whose words have a letter: a run of numbers, such as
    the first thirteen, is nobody's.
    """
    words = normal_words(text)
    if len(words) < n:
        return np.empty(0, np.uint64)
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words), np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(hashes, n)
    if spoken:
        letters = np.fromiter((not word.isnumeric() for word in words), np.int64)
        windows = windows[np.convolve(letters, np.ones(n, np.int64), "valid") * 2 >= n]
    with np.errstate(over="ignore"):  # a polynomial hash, modulo 2^64
        odd = np.uint64(0x9E3779B97F4A7C15)
        factors = np.multiply.accumulate(np.full(n, odd, np.uint64))
        return np.unique((windows * factors).sum(axis=1, dtype=np.uint64))


class Contamination:
    """The n-grams of benchmarks: which benchmark, if any, a text shares one with."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.records: dict[str, int] = {}
        self._hashes: list[npt.NDArray[np.uint64]] = []
        self._names: list[str] = []

    def add(self, name: str, texts: Iterator[str]) -> None:
        """Add a benchmark's records; those of fewer than n words cannot be found."""
        hashes = [ngram_hashes(text, self.n, spoken=True) for text in texts]
        hashes = [found for found in hashes if len(found)]
        self.records[name] = len(hashes)
        self._names.append(name)
        self._hashes.append(np.unique(np.concatenate(hashes or [np.empty(0, np.uint64)])))

    def benchmark_of(self, text: str) -> str | None:
        """The first benchmark with an n-gram that is in ``text``."""
        found = ngram_hashes(text, self.n, spoken=True)
        for name, hashes in zip(self._names, self._hashes, strict=True):
            if (
                len(hashes)
                and (hashes.take(hashes.searchsorted(found), mode="clip") == found).any()
            ):
                return name
        return None


class ContaminationFilter(BaseFilter):  # type: ignore[misc]
    """Drops documents that share an n-gram with a benchmark."""

    name = "contamination"

    def __init__(self, contamination: Contamination, exclusion_writer: DiskWriter) -> None:
        super().__init__(exclusion_writer)
        self.contamination = contamination

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep the document; if not, which benchmark it holds."""
        name = self.contamination.benchmark_of(doc.text)
        return True if name is None else (False, name)


class HeldOutIndex:
    """The n-grams of the held-out documents, to find training documents that repeat one."""

    def __init__(self, n: int, threshold: float) -> None:
        self.n = n
        self.threshold = threshold
        self._sizes: list[int] = []
        self._hashes: list[npt.NDArray[np.uint64]] = []
        self._table: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]] | None = None

    def add(self, text: str) -> None:
        """Add a held-out document; of fewer than n words, its words together count."""
        hashes = _shingles(text, self.n)
        self._hashes.append(hashes)
        self._sizes.append(len(hashes))
        self._table = None

    def repeats(self, text: str) -> bool:
        """Whether ``text`` has at least ``threshold`` of a held-out document's n-grams."""
        if not self._hashes:
            return False
        if self._table is None:
            hashes = np.concatenate(self._hashes)
            owners = np.repeat(np.arange(len(self._sizes)), self._sizes)
            order = np.argsort(hashes, kind="stable")
            self._table = hashes[order], owners[order]
        hashes, owners = self._table
        found = _shingles(text, self.n)
        first, last = np.searchsorted(hashes, found), np.searchsorted(hashes, found, "right")
        hits = [owners[a:b] for a, b in zip(first, last, strict=True) if b > a]
        if not hits:
            return False
        counts = np.bincount(np.concatenate(hits), minlength=len(self._sizes))
        return bool((counts >= self.threshold * np.maximum(self._sizes, 1)).any())


def _shingles(text: str, n: int) -> npt.NDArray[np.uint64]:
    hashes = ngram_hashes(text, n)
    if len(hashes):
        return hashes
    return np.array([xxhash.xxh3_64_intdigest(" ".join(normal_words(text)).encode())], np.uint64)
