"""Artifacts: what is finished stays whole, and what was killed never looks finished."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seodang.artifact import (
    MANIFEST,
    SIGNATURE,
    WORK,
    Artifact,
    Draft,
    Source,
    begin,
    canonical_json,
    sha256_file,
    write_atomically,
)
from seodang.errors import InputError

KIND = "test"
FILES = ("a.bin", "folder/c.bin")


def make(path: Path, config: Any, sign: Callable[[bytes], None] | None = None) -> Artifact:
    """A stage as the real ones are: resumes its files, keeps temporary ones, measures something."""
    draft = begin(path, KIND, {"value": config}, {"input": "0" * 64})
    if isinstance(draft, Artifact):
        return draft
    (path / "checkpoints" / "step").mkdir(parents=True, exist_ok=True)
    (path / "checkpoints" / "step" / "state").write_bytes(b"state")
    for name in FILES:
        file = path / name
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            write_atomically(file, f"{name} of {config}\n".encode() * 3)
    (path / ".tmp4fXz1b").write_bytes(b"safetensors writes such a file, then renames it")
    (path / ".tmp4fXz1b").replace(path / "model.safetensors")
    (path / "speed.json").write_text(json.dumps({"tokens_per_second": os.getpid()}))
    return draft.finish(
        sources=[Source(name="words", license="MIT")],
        summary={"count": len(FILES)},
        measured=["speed.json"],
        temporary=["checkpoints"],
        sign=sign,
    )


def files_of(path: Path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*")}


WHOLE = {*FILES, "folder", "model.safetensors", "speed.json", MANIFEST}


def test_a_finished_artifact_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    made = make(path, 1)
    opened = Artifact.open(path, KIND)
    assert opened.manifest == made.manifest
    assert opened.digest == made.digest
    assert opened.verify() == []
    assert files_of(path) == WHOLE
    listed = {entry.path: entry for entry in opened.manifest.files}
    assert set(listed) == WHOLE - {"folder", MANIFEST}
    for name, entry in listed.items():
        assert (entry.size, entry.sha256) == (
            (path / name).stat().st_size,
            sha256_file(path / name),
        )
        assert entry.reproducible == (name != "speed.json")
    assert opened.manifest.sources == [Source(name="words", license="MIT")]
    assert opened.manifest.summary == {"count": 2}
    assert str(tmp_path) not in (path / MANIFEST).read_text()


def test_a_second_begin_touches_nothing(tmp_path: Path) -> None:
    first = make(tmp_path / "out", {"b": [1, 2.5, None], "a": "é"})
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    # Tuples and the order of keys do not survive JSON; they must not make another artifact.
    again = begin(
        tmp_path / "out", KIND, {"value": {"a": "é", "b": (1, 2.5, None)}}, {"input": "0" * 64}
    )
    assert isinstance(again, Artifact)
    assert again.digest == first.digest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_another_config_or_input_replaces_a_finished_artifact(tmp_path: Path) -> None:
    path = tmp_path / "out"
    first = make(path, 1)
    second = make(path, 2)
    assert second.digest != first.digest
    assert (path / "a.bin").read_text().startswith("a.bin of 2")
    assert files_of(path) == WHOLE
    draft = begin(path, KIND, {"value": 2}, {"input": "1" * 64})
    assert isinstance(draft, Draft)
    assert files_of(path) == {WORK}


def test_unfinished_work_is_resumed_for_the_same_config_only(tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert isinstance(begin(path, KIND, {"value": 1}, {}), Draft)
    (path / "part").mkdir()
    (path / "part" / "0").write_text("work")
    with pytest.raises(InputError, match="continues where it stopped"):
        Artifact.open(path)
    assert isinstance(begin(path, KIND, {"value": 1}, {}), Draft)
    assert (path / "part" / "0").read_text() == "work"
    assert isinstance(begin(path, KIND, {"value": 2}, {}), Draft)
    assert files_of(path) == {WORK}


def test_identity_covers_what_is_reproducible(tmp_path: Path) -> None:
    def variant(name: str, *, text: str = "x", speed: str = "1", value: int = 1) -> Artifact:
        draft = begin(tmp_path / name, KIND, {"value": value}, {})
        assert isinstance(draft, Draft)
        (draft.path / "data").write_text(text)
        (draft.path / "speed").write_text(speed)
        return draft.finish(measured=["speed"])

    one = variant("one")
    assert variant("elsewhere").digest == one.digest
    faster = variant("faster", speed="2.5")
    assert faster.digest == one.digest
    assert faster.verify() == []
    (faster.path / "speed").write_text("9.9")  # integrity covers what identity leaves out
    assert faster.verify() == ["speed: content differs from the manifest (sha256)"]
    assert len({one.digest, variant("text", text="y").digest, variant("v", value=2).digest}) == 3


def flip(path: Path) -> None:
    data = bytearray((path / "a.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "a.bin").write_bytes(data)


def link(path: Path) -> None:
    (path / "a.bin").rename(path.parent / "a.bin")
    (path / "a.bin").symlink_to(path.parent / "a.bin")


def pipe(path: Path) -> None:
    (path / "a.bin").unlink()
    os.mkfifo(path / "a.bin")  # reading it would wait for ever


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (flip, "a.bin: content differs from the manifest (sha256)"),
        (lambda path: (path / "a.bin").write_bytes(b"short"), "a.bin: 5 bytes, manifest says 33"),
        (lambda path: (path / "folder" / "c.bin").unlink(), "folder/c.bin: missing"),
        (lambda path: shutil.rmtree(path / "folder"), "folder/c.bin: missing"),
        (lambda path: (path / "folder" / "z").touch(), "folder/z: not in the manifest"),
        (lambda path: (path / ".hidden").touch(), ".hidden: not in the manifest"),
        (lambda path: (path / "out").symlink_to("/"), "out: not in the manifest"),
        (lambda path: os.mkfifo(path / "pipe"), "pipe: not in the manifest"),
        (lambda path: (path / SIGNATURE).touch(), f"{SIGNATURE}: not in the manifest"),
        (link, "a.bin: a link or device, not a file"),
        (pipe, "a.bin: a link or device, not a file"),
    ],
)
def test_every_change_is_found(
    tmp_path: Path, change: Callable[[Path], None], problem: str
) -> None:
    made = make(tmp_path / "out", 1)
    change(made.path)
    problems = made.verify()
    assert len(problems) == 1
    assert problems[0].startswith(problem)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make(tmp_path_factory.mktemp("finished") / "out", 1)


@settings(deadline=None, max_examples=40)
@given(position=st.integers(0), bit=st.integers(0, 7), file=st.sampled_from(FILES))
def test_any_flipped_bit_is_found(finished: Artifact, position: int, bit: int, file: str) -> None:
    whole = (finished.path / file).read_bytes()
    data = bytearray(whole)
    data[position % len(data)] ^= 1 << bit
    (finished.path / file).write_bytes(data)
    assert finished.verify() == [f"{file}: content differs from the manifest (sha256)"]
    (finished.path / file).write_bytes(whole)
    assert finished.verify() == []


def test_a_detached_signature_may_be_present_and_comes_before_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "out"
    signed = []

    def sign(manifest: bytes) -> None:
        assert not (path / MANIFEST).exists()
        signed.append(manifest)
        (path / SIGNATURE).write_bytes(b"signature")

    made = make(path, 1, sign)
    assert signed == [(path / MANIFEST).read_bytes()]
    assert files_of(path) == {*WHOLE, SIGNATURE}
    assert made.verify(ignore=[SIGNATURE]) == []


def test_other_kinds_are_refused_finished_or_not(tmp_path: Path) -> None:
    make(tmp_path / "done", 1)
    assert isinstance(begin(tmp_path / "begun", KIND, {}, {}), Draft)
    (tmp_path / "begun" / "hours of work").touch()
    for name, state in (("done", "a 'test' artifact"), ("begun", "an unfinished 'test' artifact")):
        before = files_of(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: holds {state}, not 'other'"):
            begin(tmp_path / name, "other", {}, {})
        assert files_of(tmp_path / name) == before
    with pytest.raises(InputError, match="this is a 'test' artifact, not 'other'"):
        Artifact.open(tmp_path / "done", "other")


def test_what_seodang_did_not_make_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("kept")
    with pytest.raises(InputError, match="not empty and not made by Seodang"):
        begin(tmp_path / "home", KIND, {}, {})
    assert files_of(tmp_path / "home") == {"precious"}
    with pytest.raises(InputError, match="is a file; name a directory"):
        begin(tmp_path / "home" / "precious", KIND, {}, {})
    with pytest.raises(InputError, match="no such directory"):
        Artifact.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert isinstance(begin(tmp_path / "empty", KIND, {}, {}), Draft)


def test_replacing_follows_no_link_out_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("kept")
    begin(tmp_path / "out", KIND, {"value": 1}, {})
    (tmp_path / "out" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "out" / "file").symlink_to(tmp_path / "outside" / "precious")
    begin(tmp_path / "out", KIND, {"value": 2}, {})
    assert files_of(tmp_path / "out") == {WORK}
    assert (tmp_path / "outside" / "precious").read_text() == "kept"


# Crashes. A forked process is ended without any clean-up just before its n-th step on the file
# system: what is left is what `kill -9` leaves.

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
_countdown: int | None = None


def _count_steps(event: str, arguments: tuple[Any, ...]) -> None:
    global _countdown
    if _countdown is None:
        return
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in CHANGES:
        _countdown -= 1
        if _countdown < 0:
            os._exit(9)


sys.addaudithook(_count_steps)


def killed(step: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a process that is killed before its ``step``-th change; False if it ended."""
    global _countdown
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _countdown = step
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def check_state(path: Path, digests: dict[int, str]) -> None:
    """Whatever opens is one of the finished artifacts, with all of its files as they should be."""
    try:
        artifact = Artifact.open(path, KIND)
    except InputError:
        return
    assert artifact.digest in digests.values()
    wrong = [line for line in artifact.verify() if "not in the manifest" not in line]
    assert wrong == []


def check_recovery(path: Path, config: int, digests: dict[int, str]) -> None:
    artifact = make(path, config)
    assert artifact.digest == digests[config]
    assert Artifact.open(path).verify() == []
    assert files_of(path) == WHOLE


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The digests of undisturbed runs, by config."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {config: make(folder / str(config), config).digest for config in (1, 2)}


@pytest.mark.parametrize(
    ("before", "then"), [("nothing", 1), ("finished", 1), ("finished", 2), ("unfinished", 2)]
)
def test_killed_at_any_step_it_recovers(
    tmp_path: Path, digests: dict[int, str], before: str, then: int
) -> None:
    steps = 0
    while True:
        path = tmp_path / str(steps) / "out"
        if before != "nothing":
            make(path, 2)
        if before == "unfinished":
            (path / MANIFEST).unlink()
            (path / WORK).write_bytes(canonical_json({"kind": KIND}))
        if not killed(steps, lambda path=path: make(path, 1)):
            break
        check_state(path, digests)
        check_recovery(path, then, digests)
        steps += 1
    assert steps >= 15, "the steps were not seen"
    check_recovery(path, then, digests)


@settings(deadline=None, max_examples=15)
@given(
    crashes=st.lists(st.tuples(st.sampled_from([1, 2]), st.integers(0, 40)), max_size=5),
    last=st.sampled_from([1, 2]),
)
def test_killed_again_and_again_it_recovers(
    tmp_path_factory: pytest.TempPathFactory,
    digests: dict[int, str],
    crashes: list[tuple[int, int]],
    last: int,
) -> None:
    path = tmp_path_factory.mktemp("crashes") / "out"
    for config, step in crashes:
        killed(step, lambda config=config: make(path, config))
        check_state(path, digests)
    check_recovery(path, last, digests)


def test_work_left_by_a_crash_after_the_manifest_is_removed(
    tmp_path: Path, digests: dict[int, str]
) -> None:
    path = tmp_path / "out"
    step = 0
    while killed(step, lambda: make(path, 1)) and not (path / MANIFEST).exists():
        shutil.rmtree(path, ignore_errors=True)
        step += 1
    assert {"checkpoints", WORK} <= files_of(path)  # finished, and not yet tidy
    assert Artifact.open(path).digest == digests[1]
    make(path, 1)
    assert files_of(path) == WHOLE


def test_atomic_writes_leave_the_old_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")
    seen = set()
    step = 0
    while killed(step, lambda: write_atomically(file, b"new")):
        seen.add(file.read_bytes())
        step += 1
    assert seen == {b"old"}
    assert file.read_bytes() == b"new"
    assert files_of(tmp_path) == {"file"}


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), st.booleans() | st.floats(allow_nan=False) | st.lists(st.text())))
def test_canonical_json_does_not_depend_on_order(value: dict[str, Any]) -> None:
    data = canonical_json(value)
    assert canonical_json(dict(reversed(list(value.items())))) == data
    assert json.loads(data) == value
