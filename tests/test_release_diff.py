"""What changed between two releases: each kind of change, and what is not compared at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from seodang.artifact import Artifact
from seodang.recipe import ReleasedDataConfig
from seodang.release import bundle, keys
from seodang.release.diff import Change, changes, compare
from tiny import TEXT, tiny_teacher
from tiny_release import METRICS, Inputs, finished, make_inputs, source


def other_student(root: Path) -> Artifact:
    def write(path: Path) -> None:
        tiny_teacher(path, layers=3, seed=1)

    return finished(root / "student2", "student", summary={"tokens": 1000})(write)


def other_evaluation(root: Path) -> Artifact:
    metrics = json.loads(json.dumps(METRICS))
    metrics["models"]["student"] |= {"kl": 0.3, "parameters": 3_000_000}
    metrics["gate"]["checks"][0]["value"] = 0.3
    figure = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 20}
    metrics["tasks"] = {"routing": {"student": {"accuracy": figure, "by_language": {}}}}

    def write(path: Path) -> None:
        (path / "metrics.json").write_text(json.dumps(metrics))

    return finished(root / "evaluation2", "evaluation", measured=["metrics.json"])(write)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("a"), quantizations=[])


@pytest.fixture(scope="module")
def first(inputs: Inputs) -> Path:
    return bundle.build(inputs["key"].parent / "release", **inputs).path


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, on other data, with other settings, signed with another key."""
    root = tmp_path_factory.mktemp("b")
    sources = [
        source(root, name, license_, [{"text": line} for line in TEXT.splitlines()[part]])
        for name, license_, part in (
            ("help | texts", "CC-BY-SA-4.0", slice(0, 7)),
            ("new", "MIT", slice(7, 14)),
        )
    ]
    config = {"license": "MIT", "quantizations": [], "data": ReleasedDataConfig(share=0.5)}
    inputs = make_inputs(root / "run", sources, labelled=True, **config)
    inputs |= {"student": other_student(root), "evaluation": other_evaluation(root)}
    return bundle.build(root / "run" / "release", **inputs).path


def run(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON and the messages of ``seodang release diff --json``."""
    from seodang.cli import app

    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        app(["release", "diff", *map(str, arguments), "--json"])
    out, messages = capsys.readouterr()
    code = stopped.value.code or 0
    assert isinstance(code, int)
    return code, json.loads(out), messages


def test_two_releases_of_the_same_are_the_same(
    inputs: Inputs, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = bundle.build(tmp_path / "release", **inputs).path
    key = inputs["key"].with_name("signing.pub")
    assert compare(first, again, [key]) == {}
    code, printed, _ = run(capsys, first, again, "--public-key", key)
    assert code == 0
    assert (printed["same"], printed["changes"]) == (True, {})


def test_every_kind_of_change_is_found(
    first: Path, second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, _ = run(capsys, first, second)
    assert code == 0
    assert printed["same"] is False
    found = printed["changes"]
    assert found["metrics"]["student.kl"] == {"a": 0.4321, "b": 0.3}
    assert found["metrics"]["routing.student.accuracy"] == {"a": None, "b": 0.9}
    assert found["gate"] == {"beats.untrained.kl.value": {"a": 0.4321, "b": 0.3}}
    assert found["weights"]["parameters"] == {"a": 2_345_678, "b": 3_000_000}
    assert set(found["weights"]) == {"model.safetensors", "parameters"}
    assert found["config.json"] == {"num_hidden_layers": {"a": 2, "b": 3}}
    assert "tokenizer" not in found
    assert found["settings"]["license"] == {"a": "Apache-2.0", "b": "MIT"}
    assert found["settings"]["data.share"] == {"a": None, "b": 0.5}
    assert found["recipe"]["corpus.sources.new"]["a"] is None
    assert found["data"]["help | texts.license"] == {"a": "CC-BY-4.0", "b": "CC-BY-SA-4.0"}
    assert found["data"]["new"]["a"] is None
    assert found["data"]["new"]["b"]["license"] == "MIT"
    assert found["licences"]["CC-BY-4.0"] == {"a": "used", "b": None}
    assert found["licences"]["release"] == {"a": "Apache-2.0", "b": "MIT"}
    added = found["files"]["data/permissive/documents.parquet"]
    assert added["a"] is None
    assert added["b"]["bytes"] > 0
    assert found["signing key"]["sha256"]["a"] != found["signing key"]["sha256"]["b"]
    assert "software" not in found
    back = run(capsys, second, first)[1]["changes"]
    assert {k: {n: (v["b"], v["a"]) for n, v in rows.items()} for k, rows in back.items()} == {
        k: {n: (v["a"], v["b"]) for n, v in rows.items()} for k, rows in found.items()
    }


def test_the_model_card_shows_the_tasks(second: Path) -> None:
    lines = (second / "README.md").read_text().splitlines()
    at = lines.index("| routing | accuracy | – | 0.900 (0.800–1.000) | – | – |")
    assert lines[at - 2].startswith("| task | metric | Teacher | **This model** |")
    assert lines[at - 1] == "|---|---|---:|---:|---:|---:|"
    assert lines[at + 1] == ""


def test_the_table_fits_a_hundred_columns(
    first: Path,
    second: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from seodang.cli import app

    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        app(["release", "diff", str(first), str(second)])
    assert not stopped.value.code
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    (kl,) = [line.split() for line in lines if line.startswith("  student.kl ")]
    assert kl == ["student.kl", "0.4321", "0.3", "-0.1321"]
    assert any("model.safetensors" in line and line.endswith(" bytes") for line in lines)


def test_a_tampered_release_is_not_compared(
    first: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("README.md", "evaluation/metrics.json", "manifest.json", "model.sig"):
        copy = tmp_path / name.replace("/", "-") / "release"
        shutil.copytree(first, copy)
        shutil.copyfile(first.parent / "signing.pub", copy.parent / "signing.pub")
        (copy / name).write_bytes((copy / name).read_bytes().replace(b"a", b"b", 1))
        for pair in ((copy, second), (second, copy)):
            code, printed, _ = run(capsys, *pair)
            assert code == 1
            assert "not compared, it is not what was signed" in printed["error"]
            assert name in printed["error"]


def test_another_key_is_not_enough(
    first: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, stranger = keys.new_keys(tmp_path)
    assert run(capsys, first, second, "--public-key", stranger)[0] == 1
    known = [item for r in (first, second) for item in ("--public-key", r.parent / "signing.pub")]
    assert run(capsys, first, second, *known[:2])[0] == 1
    assert run(capsys, first, second, *known)[0] == 0


def test_what_is_not_a_release(
    inputs: Inputs, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lonely = tmp_path / "lonely" / "release"
    shutil.copytree(first, lonely)
    for other, message in (
        (tmp_path / "absent", "not a release, it has no manifest"),
        (inputs["corpus"].path, "this is a 'corpus' artifact, not 'release'"),
        (lonely, "name the releaser's with --public-key"),
    ):
        for pair in ((first, other), (other, first)):
            code, printed, _ = run(capsys, *pair)
            assert code == 2
            assert message in printed["error"]


def test_changes_keep_the_order_and_leave_out_what_is_equal() -> None:
    before = {"x": {"same": 1, "gone": 2, "other": None, "r": {"k": 1}}, "equal": {"y": [1]}}
    after = {"x": {"new": 3, "same": 1, "other": 0.0, "r": {"k": 2}}, "equal": {"y": [1]}}
    assert changes(before, after | {"only here": {"z": True}}) == {
        "x": [
            Change("gone", 2, None),
            Change("other", None, 0.0),
            Change("r.k", 1, 2),
            Change("new", None, 3),
        ]
    }
