"""Search by words: the first stage of a search, and what a ranking student has to beat.

BM25 (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework") as SQLite's FTS5 has
it, k1 = 1.2 and b = 0.75. English words are stemmed by FTS5 (Porter); Korean is cut into morphemes
by Kiwi first, and particles and endings are left out.
"""

from __future__ import annotations

import functools
import re
import sqlite3
import textwrap
from collections.abc import Callable, Mapping
from typing import Literal

_MEANING = ("N", "V", "M", "XR", "SL", "SN")
"""Kiwi's tags of what carries meaning: nouns, verbs, modifiers, roots, foreign words, numbers."""


class LexicalIndex:
    """Texts of one language in memory, found by the words that they share with a query."""

    def __init__(self, texts: Mapping[str, str], language: Literal["ko", "en"]) -> None:
        self._words = _morphemes() if language == "ko" else _as_written
        self._ids = list(texts)
        self._database = sqlite3.connect(":memory:")
        self._database.execute(
            "CREATE VIRTUAL TABLE texts USING fts5(words, tokenize = 'porter unicode61')"
        )
        self._database.executemany(
            "INSERT INTO texts (rowid, words) VALUES (?, ?)",
            ((row, self._words(text)) for row, text in enumerate(texts.values())),
        )

    def search(self, query: str, limit: int) -> list[tuple[str, float]]:
        """The best ids for ``query`` with their BM25 scores (higher is better), best first."""
        words = re.findall(r"\w+", self._words(query)) or re.findall(r"\w+", query)
        if not words:
            return []
        rows = self._database.execute(
            "SELECT rowid, -bm25(texts) FROM texts WHERE texts MATCH ? "
            "ORDER BY bm25(texts), rowid LIMIT ?",
            (" OR ".join(f'"{word}"' for word in words), limit),
        )
        return [(self._ids[row], score) for row, score in rows]


def best_window(text: str, query: str, width: int) -> str:
    """The part of ``text`` that has most of the query's pairs of letters: what a result shows.

    Whole words, at most ``width`` characters; of equally good parts the first.
    """
    wanted = letter_pairs(query)
    windows = textwrap.wrap(text, width, break_on_hyphens=False)
    return max(windows, key=lambda window: len(wanted & letter_pairs(window)), default="")


def letter_pairs(text: str) -> set[str]:
    """The pairs of letters that stand side by side in a word."""
    return {
        word[start : start + 2]
        for word in re.findall(r"\w\w+", text.casefold())
        for start in range(len(word) - 1)
    }


def _as_written(text: str) -> str:
    return text


@functools.cache
def _morphemes() -> Callable[[str], str]:
    from kiwipiepy import Kiwi

    kiwi = Kiwi(num_workers=1, load_multi_dict=False, load_typo_dict=False)
    return lambda text: " ".join(
        token.form for token in kiwi.tokenize(text) if token.tag.startswith(_MEANING)
    )
