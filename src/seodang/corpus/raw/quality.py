"""Which documents are worth training on: datatrove's filters, with thresholds per language.

English and Korean prose go through Gopher's quality and repetition rules (Rae et al. 2021,
"Scaling Language Models", table A1 and appendix A1.1), code through those of StarCoder's
preprocessing (Li et al. 2023, section 3.1: length of lines, share of letters and digits).

Differences from Gopher's numbers, all because these sources are manuals, rulings and interfaces
rather than web pages, which the rules were made to sort:

- At least 20 words (50 there): a message, a ruling's gist or a help entry is complete in less.
- Half of the words have a letter (80 % there), one in five may be a heading's hash (one in ten
  there), and 95 % of the lines may begin with a bullet (90 % there): in a manual, tables, lists
  and headings are the content.
- 60 % of the lines may repeat another if these hold no more than 30 % of the characters (30 and
  20 % there): closing brackets and rules of tables repeat. Repeated n-grams are not counted: the
  entries of a reference share their phrases. Repeated documents are deduplication's business.
- Korean: at least 12 words, since an eojeol holds what English writes in about 1.6 words. A word
  has 1.8 to 10 characters on average (3 to 10 there), since a character is a syllable: in the
  Korean documents of the nano recipe the mean is 4.2, and 98 % are between 2.8 and 7.4. No stop
  words are asked for: Korean puts what they say into endings.
"""

from __future__ import annotations

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.pipeline.writers.disk_base import DiskWriter

from seodang.corpus.raw.config import QualityConfig
from seodang.corpus.raw.words import WORDS


class QualityFilter(BaseFilter):  # type: ignore[misc]
    """Gopher's rules for prose, line lengths and characters for code."""

    name = "quality"

    def __init__(self, config: QualityConfig, exclusion_writer: DiskWriter) -> None:
        super().__init__(exclusion_writer)
        self.rules: dict[str, list[BaseFilter]] = {
            "en": [_gopher(config, "en"), _repetition(config)],
            "ko": [_gopher(config, "ko"), _repetition(config)],
            "code": [CodeFilter(config)],
        }

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep the document; if not, the first rule that it breaks."""
        if not doc.text:
            return False, "empty"
        for rule in self.rules[doc.metadata["language"]]:
            keep, reason = get_filter_result(rule.filter(doc))
            if not keep:
                return False, str(reason).removeprefix("gopher_").replace("_", " ")
        return True


class CodeFilter(BaseFilter):  # type: ignore[misc]
    """Drops generated and encoded files that pass for source code."""

    name = "code"

    def __init__(self, config: QualityConfig) -> None:
        super().__init__()
        self.config = config

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep the document; if not, why."""
        lengths = [len(line) for line in doc.text.split("\n") if line]
        if len(doc.text.split()) < self.config.min_words:
            return False, "short doc"
        if max(lengths) > self.config.max_line_length:
            return False, "long line"
        if sum(lengths) / len(lengths) > self.config.max_mean_line_length:
            return False, "long lines"
        if sum(c.isalnum() for c in doc.text) < self.config.min_alphanumeric * len(doc.text):
            return False, "few letters and digits"
        return True


def _gopher(config: QualityConfig, language: str) -> GopherQualityFilter:
    korean = language == "ko"
    return GopherQualityFilter(
        min_doc_words=config.min_words_ko if korean else config.min_words,
        max_doc_words=config.max_words,
        min_avg_word_length=(
            config.min_mean_word_length_ko if korean else config.min_mean_word_length
        ),
        max_avg_word_length=(
            config.max_mean_word_length_ko if korean else config.max_mean_word_length
        ),
        max_symbol_word_ratio=config.max_symbol_ratio,
        max_bullet_lines_ratio=config.max_bullet_lines,
        max_ellipsis_lines_ratio=config.max_ellipsis_lines,
        max_non_alpha_words_ratio=config.min_alphabetic_words,
        min_stop_words=0 if korean else config.min_stop_words,
        language=WORDS,
    )


def _repetition(config: QualityConfig) -> GopherRepetitionFilter:
    return GopherRepetitionFilter(
        dup_line_frac=config.max_duplicate_lines,
        dup_para_frac=config.max_duplicate_lines,
        dup_line_char_frac=config.max_duplicate_line_characters,
        dup_para_char_frac=config.max_duplicate_line_characters,
        top_n_grams=(),
        dup_n_grams=(),
        language=WORDS,
    )
