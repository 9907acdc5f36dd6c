"""Sources to documents: files of this machine, or members of a pinned package.

A record becomes a document through the source's template (``text`` or ``messages``, with the
record's fields in braces), as a list of ``turns``, or by its own ``messages`` or ``text``.
"""

from __future__ import annotations

import glob
import itertools
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

from seodang.artifact import canonical_json, sha256_bytes, sha256_file
from seodang.corpus.documents import ROLES, Document, content_id, joined, normalise
from seodang.corpus.formats import File, Record, names, read_records, too_large
from seodang.errors import InputError
from seodang.packages import open_package
from seodang.recipe import SourceConfig


def read_source(source: SourceConfig, max_document_bytes: int) -> Iterator[Document]:
    """The documents of one source, in the order of its files; empty ones included.

    Raises ``InputError`` naming file and line or record: for a pattern that matches nothing, a
    file that cannot be read as UTF-8 records, a record of the wrong shape, an unknown field or
    role, and a document of more than ``max_document_bytes`` (in UTF-8).
    """
    with ExitStack() as stack:
        for file in _files(source, stack):
            for record in read_records(file, source.records, max_document_bytes):
                body = _body(record, source, max_document_bytes)
                yield Document(
                    id=content_id(body),
                    source=source.name,
                    license=source.license,
                    origin=_origin(file, record),
                    **body,
                )


def read_jsonl(path: Path, max_document_bytes: int = 1_000_000) -> Iterator[Document]:
    """The documents of a JSONL file that belongs to no recipe: the corpus of ``seodang capture``.

    Each line is ``{"text": ...}`` or ``{"messages": [...]}``. A document's id is the line's
    ``id`` if it has one, else ``FILE#LINE``. Raises ``InputError`` as ``read_source`` does, and
    for an id that stands on two lines.
    """
    if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"{path}: wants a .jsonl file, one document per line")
    source = SourceConfig(name=path.name, license="unknown", path=str(path))
    file = _local_file(path.name, path)
    lines: dict[str, str] = {}
    for record in read_records(file, None, max_document_bytes):
        body = _body(record, source, max_document_bytes)
        origin = _origin(file, record)
        given = record.value.get("id", origin)
        if not isinstance(given, str | int):
            raise InputError(f"{record.where}: `id` must be a string or a whole number")
        if (first := lines.setdefault(str(given), record.position)) != record.position:
            raise InputError(f"{record.where}: the id {given!r} stands on line {first} already")
        yield Document(str(given), source.name, source.license, origin, **body)


def source_digest(source: SourceConfig) -> str:
    """SHA-256 of what a source is read from: its package, or the names and bytes of its files."""
    if source.sha256 is not None:
        return source.sha256
    assert source.path is not None
    hashes = [[origin, sha256_file(path)] for origin, path in _local_files(source.path)]
    return sha256_bytes(canonical_json(hashes))


def _files(source: SourceConfig, stack: ExitStack) -> Iterator[File]:
    pin = source.pin()
    if pin is None:
        assert source.path is not None
        for origin, path in _local_files(source.path):
            yield _local_file(origin, path)
        return
    package = stack.enter_context(open_package(pin))
    for pattern in source.files:
        members = package.matching(pattern)
        if not members:
            raise InputError(f"source {source.name!r}: no file of package {pin} matches {pattern}")
        for member in members:
            yield File(member, f"{pin}/{member}", partial(package.open, member))


def _local_file(origin: str, path: Path) -> File:
    def open_file() -> IO[bytes]:
        return path.open("rb")

    return File(origin, str(path), open_file)


def _local_files(pattern: str) -> list[tuple[str, Path]]:
    """The files that match, each with its path below the folder that the pattern starts from."""
    folder = Path(*itertools.takewhile(lambda p: not glob.has_magic(p), Path(pattern).parts[:-1]))
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    files = [(path.relative_to(folder).as_posix(), path) for path in found if path.is_file()]
    if files:
        return files
    if found:
        raise InputError(f"{pattern}: is a directory; name its files, as in {pattern}/*.md")
    raise InputError(f"{pattern}: no such file")


def _origin(file: File, record: Record) -> str:
    return f"{file.origin}#{record.position}" if record.position else file.origin


def _body(record: Record, source: SourceConfig, limit: int) -> dict[str, Any]:
    """``{"text": str}`` or ``{"messages": list}`` of one record, normalised."""
    value, where = record.value, record.where
    if source.turns:
        if not isinstance(value, list) or not all(isinstance(turn, str) for turn in value):
            raise InputError(f"{where}: `turns` wants a list of strings (quote numbers and dates)")
        roles = itertools.cycle(["user", "assistant"])
        turns = [{"role": r, "content": t} for r, t in zip(roles, value, strict=False)]
        body = _conversation(turns, where)
    elif not isinstance(value, dict):
        raise InputError(f"{where}: a record must be an object with named fields")
    elif source.text is not None:
        body = {"text": _clean(_fill(source.text, value, where), where)}
    elif source.messages is not None:
        turns = [
            {"role": message.role, "content": _fill(message.content, value, where)}
            for message in source.messages
        ]
        body = _conversation(turns, where)
    elif "messages" in value:
        body = _conversation(value["messages"], where)
    elif isinstance(value.get("text"), str):
        body = {"text": _clean(value["text"], where)}
    else:
        raise InputError(
            f"{where}: wants `text` (a string) or `messages` (a list); fields: {names(value)}. "
            "A template in the source (`text` or `messages`) can name other fields"
        )
    text = body["text"] if "text" in body else joined(body["messages"])
    if len(text.encode()) > limit:
        raise too_large(where, limit)
    return body


def _conversation(messages: Any, where: str) -> dict[str, Any]:
    if not isinstance(messages, list):
        raise InputError(f"{where}: `messages` must be a list")
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"{where}: message {index} must have `role` and `content` (strings)")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(
                f"{where}: message {index} has the role {role!r}; known roles: {names(ROLES)}"
            )
        turns.append({"role": role, "content": _clean(message["content"], where)})
    return {"messages": turns}


class _Template(string.Formatter):
    """``{field}``, and no way from a field into its attributes or items."""

    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, str]:
        return kwargs[field_name], field_name


def _fill(template: str, record: dict[str, Any], where: str) -> str:
    fields = {key: value for key, value in record.items() if isinstance(value, str | int | float)}
    try:
        return _Template().vformat(template, (), fields)
    except KeyError as error:
        raise InputError(
            f"{where}: no field {error} for the template {template!r}; fields: {names(fields)}"
        ) from None
    except ValueError as error:
        raise InputError(f"{where}: the template {template!r} is not valid: {error}") from None


_SURROGATE = re.compile("[\ud800-\udfff]")


def _clean(text: str, where: str) -> str:
    if _SURROGATE.search(text):
        raise InputError(f"{where}: holds half a surrogate pair, which is not a character")
    return normalise(text)
