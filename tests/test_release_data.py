"""The released part of the training data: what is in it, what never is, and who can read it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from seodang.artifact import Artifact, Source
from seodang.corpus.build import read_documents
from seodang.errors import InputError, WorkFailed
from seodang.recipe import ReleasedDataConfig
from seodang.release import bundle, data
from seodang.release.licenses import license_class
from seodang.release.verify import verify
from seodang.softlabels import open as open_store
from seodang.softlabels.export import export_documents
from seodang.softlabels.store import SoftLabelSequence
from tiny import tiny_tokenizer
from tiny_labels import run_labels
from tiny_release import Inputs, make_inputs, source
from tiny_run import WORDS
from tiny_store import LAYOUTS, PARAMETERS, config_of, sequences, synthetic_store

LICENSES = {
    "open": "MIT",
    "named": "CC-BY-4.0",
    "chosen": "LicenseRef-Paid OR MIT",
    "shared": "CC-BY-SA-4.0",
    "secret": "LicenseRef-Secret",
    "not for sale": "CC-BY-NC-4.0",
    "mixed": "MIT AND LicenseRef-Secret",
}
REFUSED = {"secret", "not for sale", "mixed"}
SHARE = 0.4


def documents(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Synthetic documents; every other one has an id that those of other sources have too."""
    rng = np.random.default_rng(seed)
    return [
        {"text": f"{name} {' '.join(rng.choice(WORDS, 30))}", "id": f"{name if i % 2 else ''}{i}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("data")
    sources = [
        source(root, name, license_, documents(name, 20, seed))
        for seed, (name, license_) in enumerate(LICENSES.items())
    ]
    config = {"quantizations": [], "data": ReleasedDataConfig(share=SHARE, seed=3)}
    return make_inputs(root / "run", sources, labelled=True, **config)


@pytest.fixture(scope="module")
def release(inputs: Inputs) -> Artifact:
    return bundle.build(inputs["key"].parent / "release", **inputs)


def released_rows(release: Path) -> pd.DataFrame:
    return pd.concat(pd.read_parquet(file) for file in release.glob("data/*/documents.parquet"))


def files_below(folder: Path) -> dict[str, bytes]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def same_labels(a: SoftLabelSequence, b: SoftLabelSequence) -> bool:
    """Whether two sequences have the same labels; the entries of a position have no order."""
    names = ("token_ids", "labelled", "offsets", "head_mass", "entropy")
    rows = [np.repeat(np.arange(len(s.token_ids)), np.diff(s.offsets)) for s in (a, b)]
    entries = [
        sorted(zip(row, s.ids, s.weights, strict=True)) for row, s in zip(rows, (a, b), strict=True)
    ]
    alike = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
    return alike and entries[0] == entries[1]


def test_only_trained_on_documents_of_allowed_licences_are_in_it(
    inputs: Inputs, release: Artifact
) -> None:
    rows = released_rows(release.path)
    assert set(rows.source) == LICENSES.keys() - REFUSED
    trained = read_documents(inputs["corpus"].path, "train")
    texts = {(d["source"], d["text"]): d for d in trained}
    for row in rows.itertuples():
        document = texts[row.source, row.text]
        assert row.license == LICENSES[row.source] == document["license"]
        assert row.digest == data.digest(document)
    for name in LICENSES.keys() - REFUSED:
        count = sum(document["source"] == name for document in trained)
        assert (rows.source == name).sum() == math.ceil(SHARE * count)


def test_classes_are_kept_apart(release: Artifact) -> None:
    found = {}
    for file in release.path.glob("data/*/documents.parquet"):
        found[file.parent.name] = set(pq.read_table(file)["source"].to_pylist())
    assert found == {
        "permissive": {"open", "chosen"},
        "attribution": {"named"},
        "share-alike": {"shared"},
    }


def test_soft_labels_are_those_of_released_documents_and_verify(
    inputs: Inputs, release: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, run = tiny_tokenizer(), run_labels(capsys)
    everything = read_documents(inputs["corpus"].path)
    whole = {sequence.digest: sequence for sequence in open_store(inputs["soft_labels"].path)}
    for folder in release.path.glob("data/*/soft-labels"):
        assert run("verify", folder)[0] == 0
        rows = pd.read_parquet(folder.parent / "documents.parquet").set_index("id")
        store = open_store(folder)
        assert store.artifact.manifest.sources[-1].name == "tiny teacher | with a bar"
        for sequence in store:
            assert tokenizer.decode(sequence.token_ids) in rows.text[sequence.document_id]
            assert same_labels(sequence, whole[sequence.digest])
        named = [document["id"] for document in everything]
        labelled = {sequence.document_id for sequence in store}
        assert labelled == {name for name in rows.index if named.count(name) == 1}
    assert len(list(release.path.glob("data/*/soft-labels"))) == 3


def test_no_text_of_a_refused_source_is_anywhere_in_it(inputs: Inputs, release: Artifact) -> None:
    tokenizer = tiny_tokenizer()
    said = " ".join(released_rows(release.path).text)
    for folder in release.path.glob("data/*/soft-labels"):
        said += " ".join(tokenizer.decode(sequence.token_ids) for sequence in open_store(folder))
    everything = read_documents(inputs["corpus"].path)
    held_out = [document for document in everything if document["split"] == "held_out"]
    refused = [document for document in everything if document["source"] in REFUSED]
    assert held_out
    assert refused
    for document in held_out + refused:
        assert document["text"] not in said
        assert document["text"][:20] not in said or document["source"] not in REFUSED


def test_two_builds_give_the_same_bytes_and_the_signature_covers_them(
    inputs: Inputs, release: Artifact, tmp_path: Path
) -> None:
    again = bundle.build(tmp_path / "release", **inputs)
    assert files_below(again.path / "data") == files_below(release.path / "data")
    assert again.digest == release.digest
    key = inputs["key"].with_name("signing.pub")
    assert verify(again.path, key) == []
    file = again.path / "data" / "permissive" / "documents.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    problems = verify(again.path, key)
    assert any("data/permissive/documents.parquet" in problem for problem in problems)
    listed = {entry.path: entry.reproducible for entry in release.manifest.files}
    assert all(listed[f"data/{name}"] for name in files_below(release.path / "data"))


def test_hugging_face_datasets_opens_it_by_its_card(
    release: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder = str(release.path / "data")
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(folder, "share-alike", split="train", cache_dir=cache)
    assert set(found["source"]) == {"shared"}
    labels = datasets.load_dataset(folder, "permissive-soft-labels", split="train", cache_dir=cache)
    store = open_store(release.path / "data" / "permissive" / "soft-labels")
    assert labels["document_id"] == [sequence.document_id for sequence in store]


def test_the_card_says_what_was_chosen_of_what(release: Artifact) -> None:
    text = (release.path / "data" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == ["cc-by-4.0", "cc-by-sa-4.0", "mit", "other"]
    assert metadata["license_name"] == "LicenseRef-Paid OR MIT"
    selection = json.loads((release.path / "data" / "selection.json").read_text())
    assert (selection["share"], selection["seed"]) == (SHARE, 3)
    for row in selection["sources"]:
        assert row["license"] == LICENSES[row["name"]]
        assert row["class"] == license_class(row["license"])
        assert (row["released"] == 0) == (row["name"] in REFUSED)
        shown = f"| {row['name']} | {row['license']} | {row['class'] or 'refused'} | "
        assert f"{shown}{row['documents']} | {row['released']} |" in body
    for fact in ("40%", "`3:DIGEST`", "The authors of these tests", selection["corpus"]):
        assert fact in body, fact
    assert "None" not in text
    assert "\n\n\n" not in text
    readme = (release.path / "README.md").read_text()
    assert "[data/](data/README.md)" in readme


def test_labels_of_a_teacher_whose_licence_is_not_known_stay_here(tmp_path: Path) -> None:
    inputs = make_inputs(
        tmp_path / "run",
        teacher=Source(name="closed", license="LicenseRef-Terms"),
        labelled=True,
        quantizations=[],
        data=ReleasedDataConfig(share=1.0),
    )
    release = bundle.build(tmp_path / "release", **inputs)
    assert [path.name for path in (release.path / "data" / "attribution").iterdir()] == [
        "documents.parquet"
    ]
    card = (release.path / "data" / "README.md").read_text()
    assert "The soft labels are left out: the licence of the teacher closed" in card
    table = pq.read_table(release.path / "data" / "attribution" / "documents.parquet")
    chats = [row for row in table.to_pylist() if row["text"] is None]
    assert chats
    assert all(row["messages"][1]["role"] == "assistant" for row in chats)


def test_where_nothing_may_be_passed_on_the_release_says_so(tmp_path: Path) -> None:
    sources = [source(tmp_path, "secret", "LicenseRef-Secret", documents("secret", 9, 1))]
    inputs = make_inputs(
        tmp_path / "run", sources, quantizations=[], data=ReleasedDataConfig(share=1.0)
    )
    with pytest.raises(WorkFailed, match=r"passed on \(LicenseRef-Secret\); release without data"):
        bundle.build(tmp_path / "release", **inputs)
    assert not (tmp_path / "release" / "manifest.json").exists()


def test_a_changed_corpus_is_not_passed_on(tmp_path: Path) -> None:
    inputs = make_inputs(
        tmp_path / "run", quantizations=[], labelled=True, data=ReleasedDataConfig(share=1.0)
    )
    file = inputs["corpus"].path / "documents.jsonl"
    file.write_text(file.read_text().replace("debit", "credit"))
    with pytest.raises(WorkFailed, match=r"documents\.jsonl: .*delete it and run again"):
        bundle.build(tmp_path / "release", **inputs)


def test_other_documents_do_not_change_what_is_chosen() -> None:
    rows = [
        {"text": row["text"], "source": "a", "license": "MIT", "tokens": 1}
        for row in documents("a", 50, 1)
    ]
    others = [{**row, "source": "b"} for row in rows[:7]]
    chosen = data.choose(rows, 0.3, 0)
    assert len(chosen) == 15
    assert [row for row in data.choose([*others, *rows[::-1]], 0.3, 0) if row["source"] == "a"] == (
        chosen[::-1]
    )
    more = data.choose(rows, 0.5, 0)
    assert all(row in more for row in chosen)
    assert data.choose(rows, 0.3, 1) != chosen


@given(
    counts=st.dictionaries(st.sampled_from(sorted(LICENSES)), st.integers(1, 12)),
    share=st.floats(1e-6, 1),
    seed=st.integers(0, 99),
)
def test_of_each_source_the_share_that_was_asked_for(
    counts: dict[str, int], share: float, seed: int
) -> None:
    rows = [
        {"text": f"{name} {i}", "source": name, "license": LICENSES[name]}
        for name, count in counts.items()
        for i in range(count)
    ]
    found = [row["source"] for row in data.choose(rows, share, seed)]
    for name, count in counts.items():
        wanted = 0 if name in REFUSED else math.ceil(share * count)
        assert found.count(name) == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", PARAMETERS)
def test_a_part_of_a_store_holds_what_the_store_holds(
    estimator: str, layout: str, tmp_path: Path
) -> None:
    items = sequences(30, seed=1)
    config = config_of(estimator, layout=layout)
    store = open_store(synthetic_store(tmp_path / "whole", config, items, shard_size=7).path)
    wanted = {"doc3", "doc4", "doc29"}
    part = open_store(export_documents(store, wanted, tmp_path / "part").path)
    assert part.verify() == []
    assert part.header == store.header
    expected = [sequence for sequence in store if sequence.document_id in wanted]
    for found, same in zip(part, expected, strict=True):
        assert same_labels(found, same)
    again = export_documents(store, wanted, tmp_path / "again")
    assert files_below(again.path) == files_below(part.path)
    with pytest.raises(InputError, match="no label of these documents"):
        export_documents(store, {"doc99"}, tmp_path / "nothing")
