"""The manifest: nothing in it changes unseen, and what cannot be read is refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import flipped, truncated
from seodang.artifact import MANIFEST, Artifact, Draft, Manifest, Source, begin
from seodang.errors import InputError

SOURCE = Source(name="words, 말", license="MIT", version="1.0", documents=3)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("aé\n", max_size=2), inner),
    max_leaves=8,
)


def make(path: Path, **summary: Any) -> Artifact:
    draft = begin(path, "test", {"threshold": 0.06, "name": "é"}, {"input": "0" * 64})
    assert isinstance(draft, Draft)
    (path / "data").write_bytes(b"data")
    return draft.finish(sources=[SOURCE], summary=summary, measured=["data"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make(tmp_path_factory.mktemp("manifest") / "out", tokens=12, skipped=[{"document": "d"}])
    return made.path / MANIFEST


def refused(file: Path, data: bytes) -> str:
    """What is said about the manifest if it holds ``data``."""
    whole = file.read_bytes()
    file.write_bytes(data)
    try:
        with pytest.raises(InputError) as caught:
            Artifact.open(file.parent)
    finally:
        file.write_bytes(whole)
    return str(caught.value)


def test_every_flipped_bit_is_found(finished: Path) -> None:
    for bit in range(8 * finished.stat().st_size):
        with flipped(finished, bit), pytest.raises(InputError) as caught:
            Artifact.open(finished.parent)
        assert str(finished) in str(caught.value)
    assert Artifact.open(finished.parent).verify() == []


def test_every_truncation_is_found(finished: Path) -> None:
    for size in range(finished.stat().st_size):
        with truncated(finished, size), pytest.raises(InputError) as caught:
            Artifact.open(finished.parent)
        assert str(finished) in str(caught.value)


def edit(**changes: Any) -> Callable[[bytes], bytes]:
    """A change of values, written as Seodang writes it, with the old checksum."""

    def change(data: bytes) -> bytes:
        return Manifest.model_validate_json(data).model_copy(update=changes).to_bytes()

    return change


@pytest.mark.parametrize(
    "change",
    [
        edit(summary={"tokens": 13}),
        edit(sources=[SOURCE.model_copy(update={"license": "proprietary"})]),
        edit(software={"seodang": "9.9"}),
        edit(files=[]),
        edit(checksum="0" * 64),
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data.replace(b"\n ", b"\n  "),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: data.replace("é".encode(), b"\\u00e9"),
        lambda data: data.replace(b'"config"', b'"config": {}, "config"'),
    ],
)
def test_any_other_way_to_write_it_is_found(
    finished: Path, change: Callable[[bytes], bytes]
) -> None:
    changed = change(finished.read_bytes())
    assert changed != finished.read_bytes()
    assert "changed after it was written" in refused(finished, changed)


def test_the_checksum_does_not_withstand_intent(finished: Path) -> None:
    """It protects against damage. Whoever computes it anew is caught by a signature alone."""
    whole = finished.read_bytes()
    manifest = Manifest.model_validate_json(whole)
    content = manifest.model_dump(exclude={"checksum"}) | {"summary": {"tokens": 13}}
    finished.write_bytes(Manifest.make(**content).to_bytes())
    assert Artifact.open(finished.parent).manifest.summary == {"tokens": 13}
    finished.write_bytes(whole)


@settings(deadline=None, max_examples=100)
@given(value=JSON)
def test_whatever_is_written_opens_again(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    path = tmp_path_factory.mktemp("any") / "out"
    made = make(path, value=value)
    assert Artifact.open(path).digest == made.digest
    assert Artifact.open(path).manifest.checksum == made.manifest.checksum


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"", "the whole file"),
        (b"\xff\xfe", "the whole file"),
        (b"[]", "the whole file"),
        (b"[" * 100_000, "the whole file"),
        (b'{"kind": "test"}', "config"),
        (b'{"name": "an app", "icons": []}', "kind"),
        (b'{"schema_version": 2, "kind": "test", "shape": "new"}', "install a newer one"),
    ],
)
def test_an_unreadable_manifest_is_refused_and_nothing_is_deleted(
    tmp_path: Path, manifest: bytes, message: str
) -> None:
    (tmp_path / MANIFEST).write_bytes(manifest)
    (tmp_path / "precious").write_text("kept")
    for call in (lambda: Artifact.open(tmp_path), lambda: begin(tmp_path, "test", {}, {})):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert str(tmp_path / MANIFEST) in str(caught.value)
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_newer_schema_is_refused(finished: Path) -> None:
    newer = json.loads(finished.read_bytes()) | {"schema_version": 2}
    message = refused(finished, json.dumps(newer).encode())
    assert "schema version 2; this Seodang reads up to 1" in message


def test_a_manifest_of_before_the_checksum_is_refused(finished: Path) -> None:
    old = json.loads(finished.read_bytes())
    del old["checksum"]
    assert "checksum: " in refused(finished, json.dumps(old, indent=1).encode() + b"\n")
