"""The artifact: a directory of data files and a ``manifest.json`` that is written last.

A directory with a manifest is finished and can be verified; one without is unfinished work that
the same stage may resume. The digest of an artifact is its identity: it covers the kind, the
config, the digests of the inputs and the files that a second run would reproduce bit for bit.
Files that hold measurements (speeds, a signature) are marked ``reproducible: false``: they are
checked by ``verify`` like every other, and left out of the identity.

The manifest has a checksum of its own content, so that damage to any part of an artifact is found.
Whoever means to change it can compute a new one: against intent there is the signature of a
release.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from seodang import __version__
from seodang.errors import InputError

MANIFEST = "manifest.json"
WORK = ".work.json"
SIGNATURE = "model.sig"  # detached: it covers the manifest, which therefore cannot list it
SCHEMA_VERSION = 1


class Source(BaseModel):
    """Where data or weights came from, as it must appear on every card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    license: str
    version: str | None = None
    sha256: str | None = None
    attribution: str | None = None
    documents: int | None = None
    tokens: int | None = None


def new_sources(found: Iterable[Source], known: Iterable[Source]) -> list[Source]:
    """Those of ``found`` that no source of ``known`` shares name and licence with."""
    named = {(source.name, source.license) for source in known}
    return [source for source in found if (source.name, source.license) not in named]


class FileEntry(BaseModel):
    """One file of an artifact: POSIX path relative to it, size in bytes, SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    size: int
    sha256: str
    reproducible: bool = True


class Manifest(BaseModel):
    """What ``manifest.json`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    schema_version: int = SCHEMA_VERSION
    config: dict[str, Any]
    inputs: dict[str, str]
    files: list[FileEntry]
    sources: list[Source]
    software: dict[str, str]
    summary: dict[str, Any] = {}
    checksum: str

    @classmethod
    def make(cls, **content: Any) -> Self:
        """The manifest with this content and its checksum."""
        manifest = cls(**content, checksum="")
        return manifest.model_copy(update={"checksum": manifest.content_checksum()})

    def content_checksum(self) -> str:
        """SHA-256, in hexadecimal, of the canonical JSON of everything but ``checksum``."""
        content = json.loads(self.model_dump_json(exclude={"checksum"}))
        return sha256_bytes(canonical_json(content))

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``: the only way in which it is written."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of ``data``, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON by an atomic rename."""
    data = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, data.encode() + b"\n")


def _files_below(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())


def _half_written(name: str) -> bool:
    """Whether a file is what a killed writer left: ``write_atomically``, or safetensors."""
    return name.endswith(".tmp") or name.startswith(".tmp")


def _read_object(data: bytes) -> dict[str, Any]:
    """A JSON object; empty if ``data`` is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _refuse_newer_schema(file: Path, data: bytes) -> None:
    """Say so before a newer schema's fields are called wrong."""
    version = _read_object(data).get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"{file}: schema version {version}; this Seodang reads up to {SCHEMA_VERSION}: "
            "install a newer one"
        )


class Artifact:
    """A finished artifact: ``path`` and its ``manifest``."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str, kind: str | None = None) -> Self:
        """Open a finished artifact.

        Raises ``InputError`` if there is no manifest, if it cannot be read or is not as it was
        written, if it is of another ``kind`` or of a schema that this version does not know.
        """
        path = Path(path)
        file = path / MANIFEST
        if not path.is_dir():
            raise InputError(f"{path}: no such directory")
        try:
            data = file.read_bytes()
            _refuse_newer_schema(file, data)
            manifest = Manifest.model_validate_json(data)
        except FileNotFoundError:
            raise InputError(
                f"{path}: no {MANIFEST}, so this is not a finished artifact; "
                "run the command that makes it again, and it continues where it stopped"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise InputError(f"{file}: {where}: {first['msg']}") from None
        if data != manifest.to_bytes() or manifest.checksum != manifest.content_checksum():
            raise InputError(
                f"{file}: changed after it was written; bring the original back, or delete {path} "
                "and run the command that makes it again"
            )
        if kind is not None and manifest.kind != kind:
            raise InputError(f"{path}: this is a {manifest.kind!r} artifact, not {kind!r}")
        return cls(path, manifest)

    @property
    def digest(self) -> str:
        """The identity: SHA-256 over kind, config, inputs and the reproducible files."""
        manifest = self.manifest
        files = [(f.path, f.size, f.sha256) for f in manifest.files if f.reproducible]
        identity = [manifest.kind, manifest.schema_version, manifest.config, manifest.inputs, files]
        return sha256_bytes(canonical_json(identity))

    def verify(self, ignore: Iterable[str] = ()) -> list[str]:
        """Every difference between the files on disk and the manifest, as readable lines.

        ``ignore`` names further files that may be present (a detached signature).
        """
        problems = []
        expected = {entry.path: entry for entry in self.manifest.files}
        present = {path.relative_to(self.path).as_posix() for path in _files_below(self.path)}
        for name in sorted(present - expected.keys() - {MANIFEST, *ignore}):
            problems.append(f"{name}: not in the manifest (an added file)")
        for name, entry in expected.items():
            file = self.path / name
            if name not in present:
                problems.append(f"{name}: missing")
            elif file.is_symlink() or not file.is_file():
                problems.append(f"{name}: a link or device, not a file")
            elif file.stat().st_size != entry.size:
                problems.append(f"{name}: {file.stat().st_size} bytes, manifest says {entry.size}")
            elif sha256_file(file) != entry.sha256:
                problems.append(f"{name}: content differs from the manifest (sha256)")
        return problems


def stage_key(kind: str, config: dict[str, Any], inputs: dict[str, str]) -> str:
    """What decides whether a stage must run again: its kind, config and input digests."""
    return sha256_bytes(canonical_json([kind, SCHEMA_VERSION, config, inputs]))


class Draft:
    """An artifact in the making: write files below ``path``, then ``finish``."""

    def __init__(
        self, path: Path, kind: str, config: dict[str, Any], inputs: dict[str, str]
    ) -> None:
        self.path = path
        self.kind = kind
        self.config = config
        self.inputs = inputs

    def finish(
        self,
        *,
        sources: Iterable[Source] = (),
        summary: dict[str, Any] | None = None,
        measured: Iterable[str] = (),
        temporary: Iterable[str] = (),
        sign: Callable[[bytes], None] | None = None,
    ) -> Artifact:
        """Hash the files, write the manifest, then delete the ``temporary`` files or folders.

        ``measured`` names the files that a second run would not reproduce bit for bit. ``sign``
        is called with the bytes of the manifest just before they are written: what has a manifest
        is finished, so its signature must be there first.
        """
        manifest = self.manifest(
            sources=sources, summary=summary, measured=measured, ignore=temporary
        )
        data = manifest.to_bytes()
        if sign is not None:
            sign(data)
        write_atomically(self.path / MANIFEST, data)
        artifact = Artifact(self.path, manifest)
        _clean_up(artifact)
        return artifact

    def manifest(
        self,
        *,
        sources: Iterable[Source] = (),
        summary: dict[str, Any] | None = None,
        measured: Iterable[str] = (),
        ignore: Iterable[str] = (),
    ) -> Manifest:
        """The manifest of the files present now; nothing is written."""
        measured, skip = set(measured), {MANIFEST, WORK, SIGNATURE, *ignore}
        files = []
        for file in _files_below(self.path):
            relative = file.relative_to(self.path)
            name = relative.as_posix()
            if not ({name, relative.parts[0]} & skip or _half_written(file.name)):
                files.append(
                    FileEntry(
                        path=name,
                        size=file.stat().st_size,
                        sha256=sha256_file(file),
                        reproducible=name not in measured,
                    )
                )
        return Manifest.make(
            kind=self.kind,
            config=self.config,
            inputs=self.inputs,
            files=files,
            sources=list(sources),
            software={"seodang": __version__},
            summary=summary or {},
        )


def _clean_up(artifact: Artifact) -> None:
    """Delete what is left of the work on a finished artifact; a crash on the way is harmless."""
    listed = {entry.path for entry in artifact.manifest.files}
    for file in _files_below(artifact.path):
        if file.relative_to(artifact.path).as_posix() not in {*listed, MANIFEST, WORK, SIGNATURE}:
            file.unlink()
    for folder in sorted(artifact.path.rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    (artifact.path / WORK).unlink(missing_ok=True)


def begin(
    path: Path | str, kind: str, config: dict[str, Any], inputs: dict[str, str]
) -> Artifact | Draft:
    """Open the finished artifact at ``path`` if it is the one asked for, else a draft of it.

    A draft that an earlier, stopped run left for the same kind, config and inputs is handed back
    with its files. A finished or unfinished artifact of another config is replaced.

    Raises ``InputError`` if ``path`` holds files that Seodang did not write, or an artifact of
    another kind, finished or not.
    """
    path = Path(path)
    config = json.loads(canonical_json(config))
    key = stage_key(kind, config, inputs)
    draft = Draft(path, kind, config, inputs)
    work = path / WORK
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; name a directory")
    if (path / MANIFEST).exists():
        artifact = Artifact.open(path)
        found = artifact.manifest
        if found.kind != kind:
            raise InputError(
                f"{path}: holds a {found.kind!r} artifact, not {kind!r}; choose another directory"
            )
        if stage_key(found.kind, found.config, found.inputs) == key:
            if work.exists():
                _clean_up(artifact)
            return artifact
        # Without its manifest an artifact is unfinished, so a crash from here on is harmless.
        work.write_bytes(b"")
        (path / MANIFEST).unlink()
    elif path.exists() and any(path.iterdir()) and not work.exists():
        raise InputError(f"{path}: not empty and not made by Seodang; choose another directory")
    path.mkdir(parents=True, exist_ok=True)
    started = _read_object(work.read_bytes()) if work.exists() else {}
    if started.get("kind", kind) != kind:
        raise InputError(
            f"{path}: holds an unfinished {started['kind']!r} artifact, not {kind!r}; "
            "choose another directory, or delete this one"
        )
    if started.get("key") != key:
        work.write_bytes(b"")  # an empty one belongs to no config, so a crash here is harmless too
        for child in path.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child.name != WORK:
                child.unlink()
        write_atomically(work, canonical_json({"key": key, "kind": kind}) + b"\n")
    return draft
