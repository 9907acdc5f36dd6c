"""Sources to files, files to shards, shards to documents: the first step of the pipeline."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from seodang.artifact import canonical_json, sha256_bytes, sha256_file
from seodang.corpus.documents import normalise
from seodang.corpus.raw.config import RawCorpusConfig, RawOrigin, RawSource
from seodang.corpus.raw.formats import CODE, is_known, kind_of, read_texts
from seodang.errors import InputError
from seodang.packages import Package, open_package

_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class RawFile:
    """A file to read: the number of its source, its name there, and its size in bytes."""

    source: int
    name: str
    size: int


def local_files(origin: RawOrigin, folder: Path) -> dict[str, Path]:
    """The files of a source on this machine, by their names below the folder that is named.

    Raises ``InputError`` if there is none.
    """
    assert origin.path is not None
    given = Path(origin.path).expanduser()
    pattern = given if given.is_absolute() else folder / given
    if pattern.is_dir():
        found = sorted(path for path in pattern.rglob("*") if path.is_file())
        files = {path.relative_to(pattern).as_posix(): path for path in found}
    else:
        matches = glob.glob(glob.escape(str(pattern))) or glob.glob(str(pattern), recursive=True)
        found = sorted(Path(name) for name in matches if Path(name).is_file())
        base = _literal_folder(pattern)
        files = {path.relative_to(base).as_posix(): path for path in found}
    kept = {name: path for name, path in files.items() if not _excluded(name, origin)}
    if not kept:
        raise InputError(f"{origin.path}: no such file (looked for {pattern})")
    return kept


def list_files(origin: RawOrigin, folder: Path, package: Package | None) -> dict[str, int]:
    """The names and sizes of an origin's files, in the order of their names.

    Files that one of the patterns finds, but whose extension is not known, are refused for a
    pattern that ends in an extension and passed over for one that does not.
    """
    if package is None:
        return {name: path.stat().st_size for name, path in local_files(origin, folder).items()}
    names: set[str] = set()
    for pattern in origin.files:
        matching = package.matching(pattern)
        if not matching:
            raise InputError(f"no file of package {origin.pin()} matches {pattern}")
        loose = pattern.endswith("*")
        names |= {name for name in matching if not loose or is_known(name)}
    return {name: package.sizes[name] for name in sorted(names) if not _excluded(name, origin)}


def origin_digest(origin: RawOrigin, folder: Path) -> str:
    """SHA-256 of what an origin is read from: its package, or the names and bytes of its files."""
    if origin.sha256 is not None:
        return origin.sha256
    files = local_files(origin, folder)
    return sha256_bytes(canonical_json([[n, sha256_file(path)] for n, path in files.items()]))


def plan(config: RawCorpusConfig, folder: Path) -> list[list[RawFile]]:
    """The files of every shard: runs of files of about equal size, in the order of the sources.

    So a shard opens few packages, and which file is in which shard depends on nothing but the
    config and the files.
    """
    files: list[RawFile] = []
    for number, source in enumerate(config.sources):
        pin = source.pin()
        with ExitStack() as stack:
            package = stack.enter_context(open_package(pin)) if pin else None
            try:
                sizes = list_files(source, folder, package)
            except InputError as error:
                raise InputError(f"source {source.name!r}: {error}") from None
        files += [RawFile(number, name, size) for name, size in _within_budget(source, sizes)]
    share = sum(file.size for file in files) / config.shards
    shards: list[list[RawFile]] = [[] for _ in range(config.shards)]
    before = 0
    for file in files:
        shards[min(int(before / share), config.shards - 1) if share else 0].append(file)
        before += file.size
    return shards


def _within_budget(source: RawSource, sizes: dict[str, int]) -> list[tuple[str, int]]:
    """The files of a source, or a fixed random choice of about ``max_bytes`` of them."""
    if source.max_bytes is None:
        return list(sizes.items())
    taken, total = [], 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= source.max_bytes:
            break
        taken.append(name)
        total += sizes[name]
    return [(name, sizes[name]) for name in sorted(taken)]


class ReadSources(PipelineStep):  # type: ignore[misc]
    """The documents of one shard's files, normalised (NFC, line ends, control characters)."""

    type = "📖 - READER"
    name = "raw text"

    def __init__(self, config: RawCorpusConfig, folder: Path, shards: list[list[RawFile]]) -> None:
        super().__init__()
        self.config = config
        self.folder = folder
        self.shards = shards

    def run(
        self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield the documents of shard ``rank``."""
        for number in dict.fromkeys(file.source for file in self.shards[rank]):
            files = [file for file in self.shards[rank] if file.source == number]
            yield from self._source(self.config.sources[number], files)

    def _source(self, source: RawSource, files: list[RawFile]) -> Iterator[Document]:
        pin = source.pin()
        with ExitStack() as stack:
            package = stack.enter_context(open_package(pin)) if pin else None
            paths = {} if package else local_files(source, self.folder)
            for file in files:
                data = package.read(file.name) if package else paths[file.name].read_bytes()
                where = f"{pin}/{file.name}" if pin else str(paths[file.name])
                published = f"{pin}/{file.name}" if pin else file.name
                encoding, texts = read_texts(data, file.name, where, source.encoding)
                for position, text in texts:
                    key = f"{published}#{position}" if position else published
                    clean = tidy(text)
                    for part, piece in enumerate(pieces(clean, self.config.part_bytes)):
                        yield Document(
                            text=piece,
                            id=sha256_bytes(piece.encode())[:16],
                            metadata={
                                "source": source.name,
                                "license": source.license,
                                "language": "code" if kind_of(file.name) in CODE else "",
                                "origin": f"{key} part {part + 1}" if part else key,
                                "key": key,
                                "encoding": encoding,
                            },
                        )


def tidy(text: str) -> str:
    """NFC, LF line ends, no control characters or lone surrogates, no blank first or last lines."""
    return normalise(_CONTROLS.sub("", _SURROGATES.sub("", text)))


def pieces(text: str, size: int) -> Iterator[str]:
    """``text`` cut at blank lines, else at line ends, into pieces of about ``size`` bytes.

    A piece is cut where the first blank line after ``size`` bytes is, or the first line end after
    twice as many; a line is never cut. The pieces joined by line ends are the text without some
    blank lines.
    """
    if len(text.encode()) <= size:
        yield text
        return
    lines: list[str] = []
    length = 0
    for line in text.split("\n"):
        if (length >= size and not line.strip()) or length >= 2 * size:
            yield "\n".join(lines).strip("\n")
            lines, length = [], 0
        lines.append(line)
        length += len(line.encode()) + 1
    if "".join(lines).strip():
        yield "\n".join(lines).strip("\n")


def _excluded(name: str, origin: RawOrigin) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in origin.exclude)


def _literal_folder(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)
