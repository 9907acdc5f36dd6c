"""Words as white space parts them: the unit of the filters, of MinHash and of n-gram overlap.

Gopher's rules count such words (Rae et al. 2021, appendix A1.1), and Korean is written with
spaces between its eojeol. datatrove's own word tokenizers are spaCy's, NLTK's and Kiwi's, which
bring models that these rules do not need; this one joins them under the name ``WORDS``.
"""

from __future__ import annotations

from datatrove.utils.word_tokenizers import WordTokenizer, load_tokenizer_assignments
from loguru import logger

WORDS = "white-space words"
"""The "language" by which datatrove's steps find this tokenizer."""


class WhiteSpaceWords(WordTokenizer):  # type: ignore[misc]
    """Words between white space, sentences between line ends."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words of ``text``, in order."""
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """The lines of ``text`` that are not blank."""
        return [line.strip() for line in text.split("\n") if line.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Where the lines of ``text`` begin and end, in characters."""
        spans, start = [], 0
        for line in text.split("\n"):
            if line.strip():
                spans.append((start, start + len(line)))
            start += len(line) + 1
        return spans


# Every process that unpickles a step of ours comes by here before the step is run.
load_tokenizer_assignments()[WORDS] = WhiteSpaceWords
logger.disable("datatrove")  # what it says is for its developers; the report says what was done
