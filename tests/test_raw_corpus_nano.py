"""The nano recipe's corpus: what it names, and a part of it built from the real packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from seodang.corpus.raw.build import build_raw_corpus
from seodang.corpus.raw.config import RawCorpusConfig
from seodang.corpus.raw.reading import read_raw
from seodang.errors import InputError
from seodang.packages import open_package

RECIPE = Path(__file__).parents[1] / "recipes" / "foundation-nano.yaml"


@pytest.fixture
def section() -> RawCorpusConfig:
    return RawCorpusConfig.model_validate(yaml.safe_load(RECIPE.read_text("utf-8"))["corpus"])


def test_every_source_says_whom_it_comes_from(section: RawCorpusConfig) -> None:
    pins = section.packages()
    assert len(pins) == len({(pin.registry, pin.package) for pin in pins})
    for source in section.sources:
        assert source.package is not None
        assert source.attribution or source.license == "CC0-1.0"


def test_real_packages_become_clean_korean_and_english(
    section: RawCorpusConfig, tmp_path: Path
) -> None:
    wanted = {"Hecto Financial documentation (ko)": 300_000, "Tax rulings (ko)": 1}
    sources = [
        source.model_copy(update={"max_bytes": wanted[source.name]})
        for source in section.sources
        if source.name in wanted
    ]
    benchmarks = [entry for entry in section.benchmarks if entry.name == "HumanEval"]
    part = section.model_copy(
        update={"sources": sources, "benchmarks": benchmarks, "shards": 1, "held_out": 0.05}
    )
    try:
        for pin in part.packages():
            open_package(pin).close()
    except InputError as error:
        pytest.skip(f"needs the fetched packages of {RECIPE.name} ({error})")
    corpus = build_raw_corpus(part, tmp_path / "c", RECIPE.parent, workers=1)
    report: dict[str, Any] = json.loads((corpus.path / "report.json").read_text("utf-8"))
    languages = report["languages"]
    assert languages["ko"]["train"]["bytes"] > 200_000
    assert set(languages) <= {"ko", "en"}
    assert report["kept"]["bytes"] > 0.5 * report["came_in"]["bytes"]
    documents = [*read_raw(corpus.path, "train"), *read_raw(corpus.path, "held-out")]
    korean = "".join(document.text for document in documents if document.language == "ko")
    hangul = sum("가" <= character <= "힣" for character in korean)
    assert hangul > 0.3 * len(korean.replace(" ", ""))
    assert {document.license for document in documents} == {source.license for source in sources}
