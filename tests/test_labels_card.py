"""The data card of a store, and the ways into a store that its pages promise."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from seodang.artifact import Source
from seodang.softlabels import SoftLabelStore
from seodang.softlabels import open as open_store
from seodang.softlabels.card import data_card, front_matter
from seodang.softlabels.export import export
from seodang.softlabels.observed import observed_weights
from seodang.softlabels.shards import StoreHeader
from tiny_labels import make_store

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "looking-at-soft-labels.md"
SUMMARY = {"tokens": 41_210, "sequences": 1_234}
SOURCES = [
    Source(name="bank help", version="2", license="MIT", sha256="ab" * 32, attribution="A bank"),
    Source(name="teacher", license="Apache-2.0"),
]
PARAMETERS: dict[str, dict[str, int | float]] = {
    "top-k": {"k": 16},
    "residual": {"k": 16},
    "sampled": {"draws": 50},
    "head-tail": {"threshold": 0.06},
}

# Synthetic: written for these tests.
DOCUMENTS = [
    {"id": "card", "text": "To replace a lost debit card, sign in. " * 3},
    {"id": "fee", "text": "The fee is 7 euros."},
    {"id": "phone", "text": "휴대폰을 다시 켜십시오. Then wait."},
]


def header(estimator: Any = "residual", teacher: str = "c" * 64) -> StoreHeader:
    return StoreHeader(
        estimator=estimator,
        parameters=PARAMETERS[estimator],
        layout="small",
        vocab_size=49_152,
        teacher=teacher,
        tokenizer="d" * 64,
    )


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    _, front, body = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found, body


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SoftLabelStore:
    folder = tmp_path_factory.mktemp("card")
    options = ("--estimator", "residual", "--k", "150", "--max-length", "20")
    return open_store(make_store(folder, "labels", *options, documents=DOCUMENTS))


@pytest.mark.parametrize("estimator", PARAMETERS)
def test_card_says_what_is_held_and_whose_it_is(estimator: str) -> None:
    front, body = parts(data_card(header(estimator), SUMMARY, SOURCES))
    assert front["license"] == ["apache-2.0", "mit"]
    assert front["size_categories"] == ["1K<n<10K"]
    (config,) = front["configs"]
    assert config["data_files"] == [{"split": "train", "path": "labels-*.parquet"}]
    assert "41,210" in body
    assert f"`{estimator}`" in body
    for name, value in PARAMETERS[estimator].items():
        assert f"{name} {value}" in body
    for word in ("bank help", "MIT", "ab" * 32, "A bank", "Apache-2.0", "c" * 64, "d" * 64):
        assert word in body
    assert "`token_ids` spell every document in full" in body
    assert "Read the\n  teacher’s terms" in body
    assert ("biased" in body) == (estimator in ("top-k", "residual"))
    assert "No licence is stated" not in body
    assert "imported" not in body
    assert data_card(header(estimator), SUMMARY, SOURCES) == data_card(
        header(estimator), SUMMARY, SOURCES
    )


def test_card_says_what_is_not_known() -> None:
    sources = [*SOURCES, Source(name="big | *model*", license="not stated")]
    front, body = parts(data_card(header(teacher="imported:" + "e" * 64), SUMMARY, sources, ["N."]))
    assert front["license"] == ["apache-2.0", "mit", "unknown"]
    assert "**No licence is stated for big \\| \\*model\\***" in body
    assert "| big \\| \\*model\\* |" in body
    assert "were imported from a file" in body
    assert "\nN.\n" in body
    assert "No licence is stated at all" in parts(data_card(header(), SUMMARY, []))[1]


@pytest.mark.parametrize(
    ("licenses", "expected", "name"),
    [
        (["Apache-2.0"], "apache-2.0", None),
        (["GPL-3.0-only", "GPL-3.0-or-later"], "gpl-3.0", None),
        (["LicenseRef-KOGL-1"], "other", "LicenseRef-KOGL-1"),
        (["MIT OR Apache-2.0", "CC0-1.0"], ["cc0-1.0", "other"], "MIT OR Apache-2.0"),
        ([], "unknown", None),
    ],
)
def test_licences_as_the_hub_names_them(
    licenses: list[str], expected: Any, name: str | None
) -> None:
    front = front_matter(SUMMARY, [Source(name="s", license=x) for x in licenses])
    assert front["license"] == expected
    assert front.get("license_name") == name


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30), st.integers(0, 10**12))
def test_no_name_breaks_the_card(name: str, license_name: str, sequences: int) -> None:
    sources = [Source(name=name, license=license_name, attribution=name)]
    summary = {"tokens": 5, "sequences": sequences}
    front, body = parts(data_card(header(), summary, sources))
    assert len(front["size_categories"]) == 1
    rows = [line for line in body.splitlines() if line.startswith("| ") and line.endswith(" |")]
    table = rows[rows.index("| source | version | licence | SHA-256 | attribution |") + 1 :]
    assert len(table) == 1  # one source, one line, whatever it is called
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", table[0])) == 6
    assert "<" not in table[0].replace("\\<", "")


def queries() -> list[str]:
    """The SQL of the documentation's page."""
    return re.findall(r"```sql\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def ask(query: str, store: SoftLabelStore, lists: Path) -> list[tuple[Any, ...]]:
    query = query.replace("'labels/", f"'{store.path}/").replace("'lists.parquet'", f"'{lists}'")
    return duckdb.sql(query).fetchall()


def test_the_documented_queries_tell_the_truth(store: SoftLabelStore, tmp_path: Path) -> None:
    lists = tmp_path / "lists.parquet"
    export(store, lists)
    by_document, along, surprise = (ask(query, store, lists) for query in queries())
    documents: dict[str, list[Any]] = {}
    for sequence in store:
        documents.setdefault(sequence.document_id, []).append(sequence)
    assert len(documents["card"]) > 1  # windows of one document are put together again
    means = {}
    for name, sequences in documents.items():
        entropy = np.concatenate([s.entropy for s in sequences])
        means[name] = (name, len(entropy), round(float(entropy.astype(float).mean()), 3))
    assert by_document == sorted(means.values(), key=lambda row: (-row[2], row[0]))
    pairs = [p for s in documents["card"] for p in zip(s.labelled, s.entropy, strict=True)]
    assert sorted(along) == sorted((int(p), float(e)) for p, e in pairs)
    for name, mean, beyond in surprise:
        weights = np.concatenate([observed_weights(s) for s in documents[name]])
        weights = weights[np.isfinite(weights)]
        expected = np.mean([-math.log(w) for w in weights if w > 0])
        assert mean == pytest.approx(expected, abs=2e-3)
        assert beyond == pytest.approx(np.mean(weights == 0), abs=1e-3)
    assert [row[0] for row in surprise] == sorted(documents)


def test_pandas_opens_the_store(store: SoftLabelStore) -> None:
    frame = pd.concat(pd.read_parquet(f) for f in sorted(store.path.glob("labels-*.parquet")))
    assert frame.document_id.tolist() == [sequence.document_id for sequence in store]
    for row, sequence in zip(frame.itertuples(), store, strict=True):
        assert np.array_equal(row.token_ids, sequence.token_ids)
        assert np.array_equal(row.entropy, sequence.entropy)


def test_hugging_face_datasets_opens_the_store_by_its_card(
    store: SoftLabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "labels"
    folder.mkdir()
    for file in store.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    card = data_card(store.header, store.artifact.manifest.summary, SOURCES)
    (folder / "README.md").write_text(card, encoding="utf-8")
    found = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["document_id"] == [sequence.document_id for sequence in store]


def test_the_documented_json_is_what_show_gives(store: SoftLabelStore) -> None:
    from seodang.softlabels.show import as_json
    from seodang.softlabels.spelling import Spelling

    (shown,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    documented, given = json.loads(shown), as_json(store, 0, Spelling(), 1, 1)["positions"][0]
    assert documented.keys() == given.keys()
    assert documented["next"].keys() == given["next"].keys()
    assert documented["entries"][0].keys() == given["entries"][0].keys()
