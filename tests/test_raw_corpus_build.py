"""A raw corpus from made-up files: each step drops what was planted for it, and nothing else.

The texts are synthetic: sentences put together from lists of words, in Korean, English and German.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from seodang.artifact import Artifact
from seodang.cli_corpus import corpus_app
from seodang.corpus.raw import build
from seodang.corpus.raw.build import build_raw_corpus
from seodang.corpus.raw.config import Benchmark, RawCorpusConfig, RawSource
from seodang.corpus.raw.held_out import side_of
from seodang.corpus.raw.reading import RawDocument, read_raw
from seodang.corpus.raw.sources import plan
from seodang.errors import InputError
from test_raw_corpus_overlap import jaccard

NOUNS = ["서당", "훈장", "제자", "문서", "기관", "병원", "공장", "열차", "기록", "계약", "규정"]
VERBS = ["배운다", "가르친다", "고친다", "만든다", "확인한다", "보낸다", "기다린다", "설명한다"]
PLACES = ["아침에", "저녁에", "교실에서", "시장에서", "역에서", "강가에서", "겨울에", "다시"]
ENGLISH = ["teacher", "pupil", "village", "letter", "engine", "river", "winter", "answer", "road"]
GERMAN = (
    "Der Lehrer hat den Schülern gestern eine sehr lange Geschichte über das alte Dorf erzählt und "
    "danach noch viele Fragen beantwortet, weil niemand nach Hause gehen wollte. "
)
QUESTION = (
    "A baker sold forty eight loaves of bread in the morning and half as many again in the "
    "afternoon before the market closed"
)


def korean(seed: int, sentences: int = 14) -> str:
    dice = random.Random(seed)
    made = [
        f"{dice.choice(PLACES)} {dice.choice(NOUNS)}의 {dice.choice(NOUNS)}도 "
        f"{dice.choice(NOUNS)}에게 {dice.choice(VERBS)}. {seed}번째 {dice.choice(NOUNS)}였다."
        for _ in range(sentences)
    ]
    return "\n".join(made)


def english(seed: int, sentences: int = 12) -> str:
    dice = random.Random(seed)
    return "\n".join(
        f"The {dice.choice(ENGLISH)} of the {dice.choice(ENGLISH)} and that {dice.choice(ENGLISH)} "
        f"have to be with {dice.choice(ENGLISH)} {dice.choice(ENGLISH)} {seed}."
        for _ in range(sentences)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of three sources, with something for every step."""
    path = tmp_path_factory.mktemp("sources")
    for name in ("ko", "en", "code"):
        (path / name).mkdir()
    for number in range(40):
        (path / "ko" / f"{number:02}.md").write_text(korean(number), encoding="utf-8")
        (path / "en" / f"{number:02}.txt").write_text(english(number), encoding="utf-8")
    (path / "ko" / "old.txt").write_bytes(korean(100).encode("euc-kr"))
    (path / "ko" / "personal.md").write_text(korean(101) + "\n연락처: 010-2345-6789", "utf-8")
    (path / "ko" / "copy.md").write_text(korean(3).replace("\n", "\n\n"), encoding="utf-8")
    near = korean(7).split("\n")
    (path / "ko" / "near.md").write_text("\n".join([*near[:-1], "끝이 다르다."]), encoding="utf-8")
    (path / "ko" / "short.md").write_text("너무 짧은 글", encoding="utf-8")
    (path / "en" / "german.txt").write_text(GERMAN * 8, encoding="utf-8")
    (path / "en" / "leak.txt").write_text(f"{english(102)}\n{QUESTION.lower()}!", "utf-8")
    code = "".join(f"def f{n}(x: int) -> int:\n    return x + {n}\n\n" for n in range(12))
    (path / "code" / "a.py").write_text(code, encoding="utf-8")
    (path / "code" / "blob.py").write_text(f"DATA = '{'x' * 5000}'\n" * 20, encoding="utf-8")
    (path / "questions.jsonl").write_text(json.dumps({"question": QUESTION}), encoding="utf-8")
    return path


def config(**changes: Any) -> RawCorpusConfig:
    sources = [
        RawSource(name="documents", license="CC-BY-4.0", path="ko", attribution="A"),
        RawSource(name="letters", license="CC0-1.0", path="en"),
        RawSource(name="programs", license="MIT", path="code"),
    ]
    benchmarks = [Benchmark(name="sums", license="MIT", path="questions.jsonl")]
    values = {"sources": sources, "benchmarks": benchmarks, "held_out": 0.15, "shards": 3}
    return RawCorpusConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def corpus(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_raw_corpus(config(), tmp_path_factory.mktemp("built") / "c", folder, workers=1)


@pytest.fixture(scope="module")
def report(corpus: Artifact) -> dict[str, Any]:
    value = json.loads((corpus.path / "report.json").read_text())
    assert isinstance(value, dict)
    return value


def everything(corpus: Artifact) -> list[RawDocument]:
    return [*read_raw(corpus.path, "train"), *read_raw(corpus.path, "held-out")]


def step(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [entry for entry in report["steps"] if entry["name"] == name]
    return dict(found)


def dropped(report: dict[str, Any], name: str) -> list[str]:
    return [sample["origin"] for sample in step(report, name)["samples"]]


def test_each_step_drops_what_was_planted_for_it(report: dict[str, Any]) -> None:
    assert dropped(report, "language") == ["german.txt"]
    assert step(report, "language")["reasons"] == {"language de": 1}
    assert sorted(dropped(report, "quality")) == ["blob.py", "short.md"]
    assert step(report, "quality")["reasons"] == {"long line": 1, "short doc": 1}
    assert dropped(report, "contamination") == ["leak.txt"]
    assert report["contamination"][0] == {
        "benchmark": "sums",
        "origin": "files of this machine",
        "ngram": 13,
        "documents": 1,
    }
    assert dropped(report, "exact-duplicates") == ["copy.md"]
    assert dropped(report, "near-duplicates") in (["near.md"], ["07.md"])
    (cluster,) = report["near_duplicates"]["largest"]
    assert {cluster["kept"], *cluster["dropped"]} == {"near.md", "07.md"}


def test_nothing_is_lost_between_the_counts(corpus: Artifact, report: dict[str, Any]) -> None:
    came, kept = report["came_in"], report["kept"]
    for unit in ("documents", "bytes"):
        lost = sum(entry["dropped"][unit] for entry in report["steps"])
        assert came[unit] == kept[unit] + lost
        assert kept[unit] == report["train"][unit] + report["held_out"][unit]
        assert kept[unit] == sum(source["kept"][unit] for source in report["sources"])
        assert kept[unit] == sum(size[unit] for size in report["licenses"].values())
    assert came["documents"] == 89
    documents = everything(corpus)
    assert kept["documents"] == len(documents)
    assert kept["bytes"] == sum(len(document.text.encode()) for document in documents)


def test_documents_carry_licence_language_and_origin(corpus: Artifact) -> None:
    documents = {document.origin: document for document in everything(corpus)}
    assert len({document.id for document in documents.values()}) == len(documents)
    old = documents["old.txt"]
    assert old.text == korean(100)  # it was in EUC-KR
    assert (old.language, old.license, old.source) == ("ko", "CC-BY-4.0", "documents")
    assert (documents["05.txt"].language, documents["05.txt"].license) == ("en", "CC0-1.0")
    assert (documents["a.py"].language, documents["a.py"].license) == ("code", "MIT")
    source = corpus.manifest.sources[0]
    assert (source.name, source.license, source.attribution) == ("documents", "CC-BY-4.0", "A")


def test_encodings_are_reported(report: dict[str, Any]) -> None:
    assert report["encodings"]["cp949"] == 1


def test_personal_data_is_masked_in_corpus_and_report(
    corpus: Artifact, report: dict[str, Any]
) -> None:
    (text,) = [d.text for d in everything(corpus) if d.origin == "personal.md"]
    assert text == korean(101) + "\n연락처: [PHONE]"
    assert report["personal_data"]["PHONE"]["found"] == 1
    assert report["personal_data"]["PHONE"]["samples"][0]["text"].endswith("연락처: [PHONE]")
    assert "2345-6789" not in json.dumps(report)


def test_no_training_document_is_as_good_as_a_held_out_one(corpus: Artifact) -> None:
    held_out = [document.text for document in read_raw(corpus.path, "held-out")]
    train = [document.text for document in read_raw(corpus.path, "train")]
    assert len(held_out) >= 5
    worst = max(jaccard(a, b, 5) for a in held_out for b in train)
    assert worst < 0.5


def test_repeats_of_held_out_documents_are_dropped(folder: Path, tmp_path: Path) -> None:
    """A training document that has a held-out one inside it, too long for MinHash to see."""
    (name,) = [n for n in ("a.md", "b.md", "c.md", "d.md", "e.md") if side_of(n, 0.3) != "train"][
        :1
    ]
    (train,) = [n for n in ("f.md", "g.md", "h.md", "i.md") if side_of(n, 0.3) == "train"][:1]
    source = tmp_path / "texts"
    source.mkdir()
    (source / name).write_text(korean(500, 4), encoding="utf-8")
    (source / train).write_text(korean(500, 4) + "\n" + korean(501, 90), encoding="utf-8")
    for number in range(6):
        (source / f"{number}.md").write_text(korean(600 + number), encoding="utf-8")
    only = config(sources=[RawSource(name="t", license="MIT", path=str(source))], held_out=0.3)
    built = build_raw_corpus(only, tmp_path / "c", folder, workers=1)
    found = json.loads((built.path / "report.json").read_text())
    assert dropped(found, "held-out-repeats") == [train]
    assert name in [document.origin for document in read_raw(built.path, "held-out")]


def test_pieces_of_a_document_stay_on_one_side(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "long"
    source.mkdir()
    for number in range(8):
        parts = "\n\n".join(korean(700 + 10 * number + part) for part in range(6))
        (source / f"{number}.md").write_text(parts, encoding="utf-8")
    long = [RawSource(name="long", license="MIT", path=str(source))]
    built = build_raw_corpus(
        config(sources=long, part_bytes=1000, held_out=0.3), tmp_path / "c", folder, workers=1
    )
    sides = {
        side: {document.origin.partition(" ")[0] for document in read_raw(built.path, side)}
        for side in ("train", "held-out")
    }
    assert len(everything(built)) > 20
    assert not sides["train"] & sides["held-out"]


def test_any_number_of_workers_gives_the_same_corpus(
    corpus: Artifact, folder: Path, tmp_path: Path
) -> None:
    assert build_raw_corpus(config(), tmp_path / "c", folder, workers=2).digest == corpus.digest


def test_a_finished_corpus_is_not_built_again(corpus: Artifact, folder: Path) -> None:
    before = (corpus.path / "manifest.json").stat().st_mtime_ns
    again = build_raw_corpus(config(), corpus.path, folder, workers=1)
    assert again.digest == corpus.digest
    assert (corpus.path / "manifest.json").stat().st_mtime_ns == before
    assert not (corpus.path / "work").exists()
    assert corpus.verify() == []


KILLED = """
import json, sys
from pathlib import Path
from seodang.corpus.raw import build
from seodang.corpus.raw.build import build_raw_corpus
from seodang.corpus.raw.config import RawCorpusConfig
config = RawCorpusConfig.model_validate_json(sys.argv[1])
build_raw_corpus(config, Path(sys.argv[2]), Path(sys.argv[3]), workers=int(sys.argv[4]))
"""


def build_elsewhere(out: Path, folder: Path, workers: int) -> subprocess.Popen[str]:
    arguments = [config().model_dump_json(), str(out), str(folder), str(workers)]
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_workers_end_quietly_at_a_ctrl_c(folder: Path, tmp_path: Path) -> None:
    process = build_elsewhere(tmp_path / "c", folder, workers=2)
    while not (tmp_path / "c" / "work" / "logs" / "clean" / "completions").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in messages  # of the first process, which has no command line here
    assert "Worker" not in messages


def test_a_killed_build_goes_on_to_the_same_corpus(
    corpus: Artifact, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    process = build_elsewhere(out, folder, workers=1)
    done = out / "work" / "logs" / "clean" / "completions"
    while process.poll() is None and not (done.is_dir() and any(done.iterdir())):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    finished = {path.name for path in done.iterdir()}
    written = {path.stem: path.stat().st_mtime_ns for path in (out / "work" / "clean").iterdir()}
    assert 0 < len(finished) < 3
    seen: dict[str, int] = {}
    make_report = build.make_report

    def look(chosen: RawCorpusConfig, out: Path, work: Path) -> dict[str, Any]:
        seen.update({path.stem: path.stat().st_mtime_ns for path in (work / "clean").iterdir()})
        return make_report(chosen, out, work)

    monkeypatch.setattr(build, "make_report", look)
    assert build_raw_corpus(config(), out, folder, workers=1).digest == corpus.digest
    for name in finished:
        assert seen[name] == written[name]  # a finished shard is not made again


def test_the_report_is_printed_as_text_as_json_and_as_a_page(
    corpus: Artifact, report: dict[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    run = CliRunner().invoke(
        corpus_app, ["report", str(corpus.path), "--json", "--html", str(page)]
    )
    assert run.exit_code == 0
    printed = json.loads(run.stdout)
    assert printed["digest"] == corpus.digest
    assert {key: printed[key] for key in report} == report
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    assert "prefers-color-scheme: dark" in html
    assert html.count("<svg") == 3
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    for shown in ("german.txt", "Near-duplicates", "CC-BY-4.0", "sums", "[PHONE]"):
        assert shown in html
    assert "2345-6789" not in html
    text = CliRunner().invoke(corpus_app, ["report", str(corpus.path)]).stdout
    assert "came in         89 documents" in text
    assert "1 phone numbers" in text


def test_a_report_of_something_else_is_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke(corpus_app, ["report", str(tmp_path), "--json"])
    assert run.exit_code == 2
    assert "not a finished artifact" in json.loads(run.stdout)["error"]


def test_documents_are_escaped_in_the_page(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "bad"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.txt").write_text(korean(number), encoding="utf-8")
    (source / "x.txt").write_text("<script>alert(1)</script>", encoding="utf-8")
    sources = [RawSource(name="<b>bad</b>", license="MIT", path=str(source))]
    built = build_raw_corpus(
        config(sources=sources, held_out=0.3), tmp_path / "c", folder, workers=1
    )
    page = tmp_path / "r.html"
    assert CliRunner().invoke(corpus_app, ["report", str(built.path), "--html", str(page)])
    html = page.read_text(encoding="utf-8")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "<b>bad" not in html


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_be_read_stops_the_build_with_its_name(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.md").write_text(korean(1), encoding="utf-8")
    mixed = "하나는 UTF-8이고\n둘도 그렇고\n".encode() + "셋은 CP949입니다".encode("cp949")
    (source / "mixed.md").write_bytes(mixed)
    sources = [RawSource(name="t", license="MIT", path=str(source))]
    with pytest.raises(InputError, match=r"mixed\.md:3: byte 0x.. at offset \d+ is not UTF-8"):
        build_raw_corpus(config(sources=sources), tmp_path / "c", folder, workers=workers)


def test_files_are_left_out_by_pattern_and_taken_up_to_a_budget(folder: Path) -> None:
    def names(**changes: Any) -> list[str]:
        source = RawSource(name="t", license="MIT", path="ko", **changes)
        shards = plan(config(sources=[source], shards=2), folder)
        return [file.name for shard in shards for file in shard]

    whole = names()
    assert whole == sorted(path.name for path in (folder / "ko").iterdir())
    assert names(exclude=["*.txt", "0*.md"]) == [
        name for name in whole if not name.endswith(".txt") and not name.startswith("0")
    ]
    some = names(max_bytes=6000)
    assert 1 < len(some) < len(whole)
    assert set(some) < set(names(max_bytes=12_000))  # a larger budget adds files


def test_nothing_to_train_on_or_nothing_held_out_is_refused(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.md").write_text("짧은 글", encoding="utf-8")
    only = [RawSource(name="t", license="MIT", path=str(source))]
    with pytest.raises(
        InputError, match=r"no document to train on \(1 came in; dropped: .*quality 1"
    ):
        build_raw_corpus(config(sources=only), tmp_path / "c", folder, workers=1)
    with pytest.raises(InputError, match=r"no document held out .*raise `held_out`"):
        build_raw_corpus(config(held_out=1e-9), tmp_path / "d", folder, workers=1)
    nowhere = [RawSource(name="t", license="MIT", path="nowhere")]
    with pytest.raises(InputError, match=r"nowhere: no such file"):
        build_raw_corpus(config(sources=nowhere), tmp_path / "e", folder, workers=1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a", "package": "b"}, "name exactly one of `path` and `package`"),
        ({"package": "b", "version": "1", "files": ["*"]}, "a package needs `version` and"),
        ({"package": "b", "version": "1", "sha256": "0" * 64}, "a package needs `files`"),
        ({"path": "a", "sha256": "0" * 64}, "belong to a `package`"),
        ({"path": "a", "license": "free"}, "write an SPDX expression, or LicenseRef-NAME"),
        (
            {"package": "@a/b", "version": "1", "sha256": "0" * 64, "files": ["*"]},
            "'@a/b' is not a package name of pypi",
        ),
    ],
)
def test_a_source_that_does_not_fit_together_is_refused(
    source: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        RawSource(**{"name": "a", "license": "MIT", **source})


def test_two_sources_of_one_name_are_refused() -> None:
    twice = [RawSource(name="a", license="MIT", path="x")] * 2
    with pytest.raises(ValidationError, match="`sources`: two have the name 'a'"):
        RawCorpusConfig(sources=twice)


@settings(max_examples=200)
@given(st.text(min_size=1, max_size=30), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_a_document_keeps_its_side_and_more_are_held_out_for_a_larger_share(
    key: str, a: float, b: float
) -> None:
    small, large = sorted((a, b))
    assert side_of(key, small) == side_of(key, small)
    if side_of(key, small) == "held-out":
        assert side_of(key, large) == "held-out"


def test_the_share_that_is_held_out() -> None:
    sides = [side_of(str(number), 0.1) for number in range(10_000)]
    assert 0.09 < sides.count("held-out") / len(sides) < 0.11


def test_sides_are_train_and_held_out(corpus: Artifact) -> None:
    with pytest.raises(ValueError, match="side must be train or held-out"):
        read_raw(corpus.path, "test")  # type: ignore[arg-type]
