"""The stage as a whole: bytes, provenance, budgets, what is dropped, what runs again."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from seodang.artifact import Artifact
from seodang.corpus.build import build, read_documents, read_sequences
from seodang.errors import InputError
from seodang.recipe import CorpusConfig
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOPICS = ["card", "order", "phone", "bill", "refund", "signal", "account", "router"]


def write_sources(folder: Path) -> None:
    """Synthetic: conversations about topics, a folder of help pages, and things to be dropped."""
    chats = [
        {"q": f"What about the {a} and its {b}?", "a": f"Ask us about {a} number {i} with {b}."}
        for i, (a, b) in enumerate((a, b) for a in TOPICS for b in TOPICS)
    ]
    (folder / "chats.json").write_text(json.dumps([*chats, chats[0], {"q": "Hm?", "a": " "}]))
    (folder / "help").mkdir()
    for i, topic in enumerate(TOPICS):
        text = (
            f"Page {i} on the {topic}. " + f"The {topic} has rule {i * 7} and rule {i * 11}. " * 9
        )
        (folder / "help" / f"{topic}.md").write_text(text)
    (folder / "help" / "empty.md").write_text(" \n")
    (folder / "help" / "one.md").write_text("a")


def config(folder: Path, chats: dict[str, Any] | None = None, **keys: Any) -> CorpusConfig:
    template = [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]
    first = {
        "name": "chats",
        "license": "MIT",
        "attribution": "us",
        "path": str(folder / "chats.json"),
        "messages": template,
    }
    pages = {"name": "pages", "license": "CC0-1.0", "path": str(folder / "help" / "*.md")}
    sources = [{**first, **(chats or {})}, pages]
    return CorpusConfig.model_validate(
        {"sources": sources, "max_length": 48, "held_out": 0.2, **keys}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sources(tmp_path)
    return tmp_path


def test_two_builds_have_equal_bytes_and_no_machine_paths(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    write_sources(moved)
    one = build(config(folder), TOKENIZER, "fp", tmp_path / "one")
    two = build(config(moved), TOKENIZER, "fp", tmp_path / "two")
    assert one.digest == two.digest
    for name in ("documents.jsonl", "sequences.parquet", "manifest.json"):
        data = (one.path / name).read_bytes()
        assert data == (two.path / name).read_bytes()
        assert os.fsencode(tmp_path) not in data


def test_every_sequence_is_traced_to_its_document_source_and_licence(
    folder: Path, tmp_path: Path
) -> None:
    corpus = build(config(folder), TOKENIZER, "fp", tmp_path / "out")
    documents = {d["id"]: d for d in read_documents(corpus.path)}
    licences = {source.name: source.license for source in corpus.manifest.sources}
    tokens: Counter[str] = Counter()
    labelled: Counter[str] = Counter()
    for side in ("train", "held_out"):
        for sequence in read_sequences(corpus.path, side):
            document = documents[sequence.document_id]
            assert document["split"] == side
            assert document["license"] == licences[document["source"]]
            tokens[document["id"]] += len(sequence.token_ids)
            labelled[side] += len(sequence.labelled)
            text = TOKENIZER.decode(sequence.token_ids)
            if "text" in document:
                assert text in document["text"]
                assert (folder / "help" / document["origin"]).read_text().rstrip() == document[
                    "text"
                ]
            else:
                file, _, index = document["origin"].partition("#")
                record = json.loads((folder / file).read_text())[int(index)]
                assert record["a"] == document["messages"][1]["content"]
                assert len(sequence.token_ids) == 48 or text.endswith("<|im_end|>\n")
    assert tokens == {d["id"]: d["tokens"] for d in documents.values()}
    summary = corpus.manifest.summary
    assert summary["labelled_tokens"] == labelled
    assert sum(summary["tokens"].values()) == tokens.total()
    assert sum(source.tokens for source in corpus.manifest.sources) == tokens.total()
    assert [source.documents for source in corpus.manifest.sources] == [64, 8]
    assert summary["dropped"] == {
        "exact duplicate": 1,
        "without an answer": 1,
        "empty": 1,
        "shorter than two tokens": 1,
    }


def test_the_parquet_columns_are_those_of_the_contract(folder: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    corpus = build(config(folder), TOKENIZER, "fp", tmp_path / "out")
    table = pq.read_table(corpus.path / "sequences.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "document_id": "string",
        "split": "string",
        "digest": "string",
        "token_ids": "list<element: int32>",
        "labelled": "list<element: int32>",
    }
    sequences = read_sequences(corpus.path, "train") + read_sequences(corpus.path, "held_out")
    assert Counter(table["digest"].to_pylist()) == Counter(s.digest for s in sequences)


def test_a_second_build_does_nothing_and_a_changed_file_runs_again(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = build(config(folder), TOKENIZER, "fp", out)
    written = (out / "manifest.json").stat().st_mtime_ns
    assert build(config(folder), TOKENIZER, "fp", out).digest == first.digest
    assert (out / "manifest.json").stat().st_mtime_ns == written
    assert build(config(folder), TOKENIZER, "other", out).digest != first.digest
    (folder / "help" / "card.md").write_text("Now the page on cards says something else.")
    changed = build(config(folder), TOKENIZER, "fp", out)
    assert changed.digest != first.digest
    assert any("something else" in d.get("text", "") for d in read_documents(out))
    assert Artifact.open(out).verify() == []


def test_budgets_take_until_they_are_met(folder: Path, tmp_path: Path) -> None:
    corpus = build(config(folder, {"max_tokens": 300}), TOKENIZER, "fp", tmp_path / "a")
    chats, pages = corpus.manifest.sources
    longest = max(d["tokens"] for d in read_documents(corpus.path) if "messages" in d)
    assert 300 <= chats.tokens < 300 + longest
    assert pages.documents == 8
    keys = {"train_tokens": 400, "held_out_tokens": 100}
    corpus = build(config(folder, **keys), TOKENIZER, "fp", tmp_path / "b")
    longest = max(d["tokens"] for d in read_documents(corpus.path))
    tokens = corpus.manifest.summary["tokens"]
    assert 400 <= tokens["train"] < 400 + longest
    assert 100 <= tokens["held_out"] < 100 + longest
    assert corpus.manifest.summary["dropped"]["beyond a token budget"] > 0


def test_an_empty_corpus_names_its_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    (tmp_path / "b.txt").write_text("a")
    sources = [
        {"name": name, "license": "MIT", "path": str(tmp_path / f"{name}.txt")} for name in "ab"
    ]
    empty = CorpusConfig.model_validate({"sources": sources})
    message = r"'a': 1 empty; 'b': 1 shorter than two tokens"
    with pytest.raises(InputError, match=message) as caught:
        build(empty, TOKENIZER, "fp", tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out" / "manifest.json").exists()
    (tmp_path / "b.txt").write_text("one document alone")
    with pytest.raises(InputError, match="too small"):
        build(empty, TOKENIZER, "fp", tmp_path / "out")


def test_a_source_that_gives_nothing_beside_others_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("seodang.corpus.build.say", said.append)
    (folder / "chats.json").write_text('[{"q": "Hm?", "a": " "}]')
    corpus = build(config(folder), TOKENIZER, "fp", tmp_path / "out")
    assert corpus.manifest.sources[0].documents == 0
    assert "corpus: the source 'chats' gave nothing: 1 without an answer" in said


def test_sources_with_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="several have the name 'pages'"):
        build(config(folder, {"name": "pages"}), TOKENIZER, "fp", tmp_path / "out")
