"""Files to records, by extension.

====================  ==================================================================
``.jsonl``            a record per line
``.json``             a list of records, at the top or at a dotted path
``.yml``, ``.yaml``   the same
``.md``, ``.txt``     the file is one record with the fields ``text`` and ``name``
``.html``, ``.htm``   the same: the page's text without scripts, styles and navigation
``.pdf``              the same: the text of its pages
====================  ==================================================================

Each may be gzipped (``.jsonl.gz``).
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from seodang.errors import InputError


@dataclass(frozen=True)
class File:
    """A file to read: ``origin`` may be published, ``shown`` names it to the person here."""

    origin: str
    shown: str
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Record:
    """A parsed record: ``where`` it stands, for errors, and its ``position`` in the file or ""."""

    value: Any
    where: str
    position: str = ""


def read_records(file: File, path: str | None, limit: int) -> Iterator[Record]:
    """The records of a file; ``path`` is the dotted path to a JSON or YAML file's list.

    Raises ``InputError`` naming the line for an unknown extension, what is not UTF-8 or cannot be
    parsed, a ``path`` that leads nowhere, and a line or plain text of more than ``limit`` bytes.
    """
    suffix = Path(file.origin.lower().removesuffix(".gz")).suffix
    try:
        with ExitStack() as stack:
            stream = stack.enter_context(file.open())
            if file.origin.lower().endswith(".gz"):
                stream = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=stream)))
            match suffix:
                case ".json" | ".yml" | ".yaml":
                    load = _load_json if suffix == ".json" else _load_yaml
                    yield from _listed(load(_decode(stream.read(), file), file), file, path)
                case _ if path is not None:
                    raise InputError(f"{file.shown}: `records` is for .json and .yml files only")
                case ".jsonl":
                    yield from _lines(stream, file, limit)
                case ".md" | ".txt":
                    data = stream.read(limit + 1)
                    if len(data) > limit:
                        raise too_large(file.shown, limit)
                    yield _whole(_decode(data, file), file)
                case ".html" | ".htm":
                    yield _whole(_html_text(_decode(stream.read(), file)), file)
                case ".pdf":
                    yield _whole(_pdf_text(stream.read(), file), file)
                case _:
                    raise InputError(
                        f"{file.shown}: unknown extension {suffix!r}; known: .jsonl, .json, .yml, "
                        ".yaml, .md, .txt, .html, .htm, .pdf (each also with .gz)"
                    )
    except FileNotFoundError:
        raise InputError(f"{file.shown}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file.shown}: cannot be read: {error}") from None
    except RecursionError:
        raise InputError(f"{file.shown}: nested too deeply") from None


def too_large(where: str, limit: int) -> InputError:
    """The error for a document of more than ``limit`` bytes."""
    return InputError(
        f"{where}: a document of more than {limit:,} bytes; split it, or raise "
        "max_document_bytes (`corpus.max_document_bytes` in a recipe)"
    )


def names(keys: Iterable[Any]) -> str:
    """Keys as an error message lists them."""
    return ", ".join(str(key) for key in keys) or "none"


def _decode(data: bytes, file: File, line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        byte = error.object[error.start]
        raise InputError(
            f"{file.shown}:{line}: not UTF-8 (byte 0x{byte:02x}); "
            "convert the file first, as with iconv -t UTF-8"
        ) from None


def _lines(stream: IO[bytes], file: File, limit: int) -> Iterator[Record]:
    for number in itertools.count(1):
        line = stream.readline(limit + 2)
        if not line:
            return
        where = f"{file.shown}:{number}"
        if len(line.rstrip(b"\r\n")) > limit:
            raise too_large(where, limit)
        text = _decode(line, file, number)
        if text.strip():
            try:
                yield Record(json.loads(text), where, str(number))
            except ValueError as error:
                raise InputError(f"{where}: not valid JSON: {error}") from None


def _load_json(text: str, file: File) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{file.shown}:{error.lineno}: not valid JSON: {error.msg}") from None
    except ValueError as error:
        raise InputError(f"{file.shown}: not valid JSON: {error}") from None


def _load_yaml(text: str, file: File) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)  # not the C loader: deep nesting overflows its stack
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{file.shown}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{file.shown}: not valid YAML: {error}") from None


def _listed(data: Any, file: File, path: str | None) -> Iterator[Record]:
    """The records of a list: ``data`` itself, or what lies at a dotted path in it."""
    for key in path.split(".") if path else []:
        if not isinstance(data, dict) or key not in data:
            found = names(data) if isinstance(data, dict) else "no object"
            raise InputError(f"{file.shown}: `records: {path}`: no key {key!r}; found: {found}")
        data = data[key]
    if isinstance(data, list):
        for index, value in enumerate(data):
            yield Record(value, f"{file.shown}, record {index}", str(index))
        return
    lists = [k for k, v in data.items() if isinstance(v, list)] if isinstance(data, dict) else []
    hint = f"; name the list's key with `records`: {names(lists)}" if lists else ""
    raise InputError(f"{file.shown}: not a list of records{hint}")


def _whole(text: str, file: File) -> Record:
    name = Path(file.origin.removesuffix(".gz")).stem
    return Record({"text": text, "name": name}, file.shown)


_DROPPED = ["script", "style", "nav", "noscript", "template", "svg", "iframe"]
_BLOCKS = (
    "address, article, aside, blockquote, caption, dd, details, div, dl, dt, fieldset, figcaption,"
    "figure, footer, form, h1, h2, h3, h4, h5, h6, header, hr, li, main, ol, p, section, summary,"
    "table, tr, ul"
)
_BREAK = "\ue000"


def _html_text(html: str) -> str:
    """A line per block of ``<main>``, or of the whole body.

    White space in HTML does not end lines, so line ends are marked by a private-use character.
    """
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(html)
    tree.strip_tags(_DROPPED)
    for node in tree.css("pre"):
        node.replace_with(_BREAK + node.text().replace("\n", _BREAK) + _BREAK)
    for node in tree.css("br"):
        node.replace_with(_BREAK)
    for node in tree.css("td, th"):
        node.insert_after(" ")
    for node in tree.css(_BLOCKS):
        node.insert_before(_BREAK)
        node.insert_after(_BREAK)
    root = tree.css_first("main") or tree.body
    lines = (" ".join(line.split()) for line in (root.text() if root else "").split(_BREAK))
    return "\n".join(line for line in lines if line)


def _pdf_text(data: bytes, file: File) -> str:
    from pypdf import PdfReader

    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(io.BytesIO(data)).pages)
    except Exception as error:  # a broken PDF raises nearly anything
        raise InputError(f"{file.shown}: not a readable PDF: {error}") from None
