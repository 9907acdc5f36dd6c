"""The ``corpus`` section of a foundation recipe: where raw text comes from, and what is kept."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from seodang.packages import PackagePin, Registry
from seodang.recipe import Origin, Section

Share = Annotated[float, Field(ge=0, le=1)]


def _check_license(expression: str) -> str:
    """Refuse what is no SPDX license expression."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        return str(canonicalize_license_expression(expression))
    except InvalidLicenseExpression as error:
        raise ValueError(f"{error}: write an SPDX expression, or LicenseRef-NAME") from None


License = Annotated[str, AfterValidator(_check_license)]


class RawOrigin(Origin):
    """Files of this machine (``path``), or of a ``package`` of one of the registries."""

    registry: Registry = Field("pypi", description="which registry the package is of")
    package: str | None = None
    version: str | None = None
    files: list[str] = Field([], description="patterns of members of the package")
    exclude: list[str] = Field([], description="patterns of files that are left out")
    license: License = Field(description="SPDX expression, or LicenseRef-...")
    attribution: str | None = Field(None, description="whom the licence wants named")

    @property
    def _registry(self) -> Registry:
        return self.registry

    @model_validator(mode="after")
    def _files_of_a_package(self) -> Self:
        if (self.package is not None) != bool(self.files):
            raise ValueError("a package needs `files`, and a `path` has none")
        try:
            self.pin()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self


class RawSource(RawOrigin):
    """Raw text with one licence, read by the extension of each file (see ``raw.formats``)."""

    name: str = Field(min_length=1, description="how it is called in the report and on cards")
    encoding: str | None = Field(
        None, description="of every file (default: UTF-8, else detected, see the report)"
    )
    max_bytes: int | None = Field(
        None, gt=0, description="take about this much text at most, whole files in a fixed order"
    )


class Benchmark(RawOrigin):
    """An evaluation set that must not be in the corpus: the texts of its files' records."""

    name: str = Field(min_length=1, description="how it is called in the report")


class QualityConfig(Section):
    """Thresholds below or above which a document is dropped (sources: ``raw.quality``)."""

    min_words: int = Field(20, ge=1, description="white-space words, of English and of code")
    min_words_ko: int = Field(12, ge=1, description="the same, of Korean")
    max_words: int = Field(200_000, ge=1, description="of prose: longer is a dump")
    min_mean_word_length: float = Field(3.0, ge=0, description="characters, of English")
    max_mean_word_length: float = Field(10.0, gt=0, description="characters, of English")
    min_mean_word_length_ko: float = Field(1.8, ge=0, description="characters, of Korean")
    max_mean_word_length_ko: float = Field(10.0, gt=0, description="characters, of Korean")
    max_symbol_ratio: Share = Field(0.2, description="hashes, or ellipses, per word")
    max_bullet_lines: Share = Field(0.95, description="share of lines that begin with a bullet")
    max_ellipsis_lines: Share = Field(0.3, description="share of lines that end in an ellipsis")
    min_alphabetic_words: Share = Field(0.5, description="share of words with a letter")
    min_stop_words: int = Field(2, ge=0, description="different stop words, of English")
    max_duplicate_lines: Share = Field(0.6, description="share of lines that repeat another")
    max_duplicate_line_characters: Share = Field(0.3, description="share of characters in them")
    max_line_length: int = Field(2_000, gt=0, description="characters, of code: longer is data")
    max_mean_line_length: int = Field(120, gt=0, description="characters, of code")
    min_alphanumeric: Share = Field(0.25, description="share of characters, of code")


class DeduplicationConfig(Section):
    """MinHash with locality-sensitive hashing: bands of ``bucket_hashes`` hashes each."""

    ngram: int = Field(5, ge=1, description="words of a shingle")
    buckets: int = Field(14, ge=1, description="bands")
    bucket_hashes: int = Field(8, ge=1, description="hashes of a band")
    held_out_overlap: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of a held-out document's shingles, from which a training document "
        "that has them is dropped",
    )


class RawCorpusConfig(Section):
    """Raw text to clean, deduplicated, licensed documents, and the part that is held out."""

    sources: list[RawSource] = Field(min_length=1)
    languages: list[Literal["ko", "en"]] = Field(
        ["ko", "en"], min_length=1, description="languages of prose that are kept; code always is"
    )
    min_language_probability: Share = Field(
        0.5, description="of the identified language, below which a document is dropped"
    )
    part_bytes: int = Field(
        100_000,
        ge=1_000,
        description="longer prose is cut at paragraphs into documents of about this size",
    )
    quality: QualityConfig = QualityConfig()
    deduplication: DeduplicationConfig = DeduplicationConfig()
    benchmarks: list[Benchmark] = Field([], description="evaluation sets to keep out")
    benchmark_ngram: int = Field(
        13, ge=2, description="words in a row that a document and a benchmark may not share"
    )
    held_out: float = Field(0.01, gt=0, lt=1, description="share of documents held out")
    shards: int = Field(8, ge=1, le=512, description="pieces of the work, and files of the result")
    seed: int = Field(0, ge=0, description="of the MinHash functions and of the samples")

    @model_validator(mode="after")
    def _names_are_different(self) -> Self:
        for key, entries in (("sources", self.sources), ("benchmarks", self.benchmarks)):
            names = [entry.name for entry in entries]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"`{key}`: two have the name {name!r}; rename one")
        return self

    def packages(self) -> list[PackagePin]:
        """Every package that the section names, once."""
        pins = [origin.pin() for origin in (*self.sources, *self.benchmarks)]
        return list(dict.fromkeys(pin for pin in pins if pin is not None))


def origin_name(path: str) -> str:
    """The last part of a path: what may be published of a place on this machine."""
    return PurePosixPath(path.replace("\\", "/")).name
