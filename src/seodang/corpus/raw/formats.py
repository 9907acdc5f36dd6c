"""Files to texts, by extension.

==========================================  ===================================================
``.md``, ``.mdx``                           as it is, without front matter, comments and lines
                                            of nothing but a tag
``.rst``, ``.txt``                          as it is
``.html``, ``.htm``                         the page's text, without scripts and navigation
``.json``                                   a text; of a list, a text per record
``.jsonl``                                  a text per line
``.csv``, ``.tsv``                          a text per row
``.po``, ``.mo``                            the translations, a line each
``.ftl``                                    the messages of a Fluent file
``.page``                                   the paragraphs of a Mallard page
source code (``CODE``)                      as it is
==========================================  ===================================================

Each may be compressed (``.gz``, ``.bz2``, ``.xz``). A record becomes the lines of all strings in
it that can be sentences, those of several words, which identifiers, numbers and addresses are not;
strings that are HTML are read as such.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from seodang.corpus import formats as documents
from seodang.corpus.raw.encodings import decode
from seodang.errors import InputError

CODE = frozenset(
    {".c", ".cc", ".cpp", ".css", ".cu", ".go", ".h", ".hpp", ".java", ".js", ".jsx", ".kt"}
    | {".lua", ".php", ".pl", ".pxd", ".py", ".pyi", ".pyx", ".r", ".rb", ".rs", ".scala"}
    | {".sh", ".sql", ".swift", ".ts", ".tsx", ".vue"}
)
_HTML = re.compile(r"\s*<[a-z][a-z0-9]*[ >]")
_COMPRESSED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_MARKUP_LINES = re.compile(
    r"^[ \t]*</?[A-Za-z][^<>\n]*>[ \t]*\n|<!--.*?-->", re.DOTALL | re.MULTILINE
)


def kind_of(name: str) -> str:
    """The extension that decides how a file is read, in lower case; "" if it has none."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def is_known(name: str) -> bool:
    """Whether a file of this name can be read."""
    return kind_of(name) in CODE or kind_of(name) in {*_READERS, ".mo"}


def read_texts(
    data: bytes, name: str, where: str, encoding: str | None
) -> tuple[str, Iterator[tuple[str, str]]]:
    """The encoding of a file, and its texts, each with its position ("" if the file is one text).

    Raises ``InputError`` with ``where`` for an extension that is not known, bytes that cannot be
    decompressed or decoded, and, as the texts are taken, for content that is not what the
    extension says.
    """
    unpack = _COMPRESSED.get(PurePosixPath(name.lower()).suffix)
    try:
        data = unpack(data) if unpack else data
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{where}: cannot be decompressed: {error}") from None
    kind = kind_of(name)
    if kind == ".mo":
        return "in the file", _compiled(data, where)
    if not is_known(name):
        known = ", ".join(sorted([*_READERS, ".mo"]))
        raise InputError(
            f"{where}: unknown extension {kind!r}; known: {known}, and those of source code; "
            "leave the file out with `exclude`"
        )
    decoded = decode(data, where, encoding)
    text = decoded.text.replace("\r\n", "\n").replace("\r", "\n")
    return decoded.encoding, iter([("", text)]) if kind in CODE else _READERS[kind](text, where)


def _plain(text: str, where: str) -> Iterator[tuple[str, str]]:
    yield "", text


def _markdown(text: str, where: str) -> Iterator[tuple[str, str]]:
    yield "", _MARKUP_LINES.sub("", _FRONT_MATTER.sub("", text, count=1))


def _html(text: str, where: str) -> Iterator[tuple[str, str]]:
    yield "", _html_text(text)


def _html_text(html: str) -> str:
    data = html.encode()
    file = documents.File(origin="page.html", shown="", open=lambda: io.BytesIO(data))
    return "\n".join(r.value["text"] for r in documents.read_records(file, None, len(data)))


def _json(text: str, where: str) -> Iterator[tuple[str, str]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if isinstance(value, list):
        for index, record in enumerate(value):
            yield str(index), _record(record)
    else:
        yield "", _record(value)


def _json_lines(text: str, where: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}:{number}: not valid JSON: {error}") from None
            yield str(number), _record(value)


def _table(text: str, where: str, separator: str = ",") -> Iterator[tuple[str, str]]:
    try:
        for row in (reader := csv.DictReader(io.StringIO(text), delimiter=separator)):
            yield str(reader.line_num), _record(row)
    except csv.Error as error:
        raise InputError(f"{where}: not a valid table: {error}") from None


def _record(value: Any) -> str:
    return "\n".join(dict.fromkeys(_sentences(value)))


def _sentences(value: Any) -> Iterator[str]:
    """The strings in a JSON value, in their order, that are more than a name or a number."""
    if isinstance(value, str):
        if _is_sentence(value):
            yield _html_text(value) if _HTML.match(value) else value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _sentences(child)


def _is_sentence(text: str) -> bool:
    return len(text.split()) > 1 and any(map(str.isalpha, text))


def _po(text: str, where: str) -> Iterator[tuple[str, str]]:
    import polib

    try:
        catalogue = polib.pofile(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: not a valid .po file: {error}") from None
    yield "", _translations(catalogue)


def _compiled(data: bytes, where: str) -> Iterator[tuple[str, str]]:
    import tempfile

    import polib

    with tempfile.NamedTemporaryFile(suffix=".mo") as file:  # polib reads .mo from a path only
        file.write(data)
        file.flush()
        try:
            yield "", _translations(polib.mofile(file.name))
        except (OSError, ValueError, UnicodeDecodeError) as error:
            raise InputError(f"{where}: not a valid .mo file: {error}") from None


def _translations(catalogue: Any) -> str:
    """What was translated, shortest context kept out: fuzzy and untranslated entries are not."""
    lines = []
    for entry in catalogue:
        if not entry.obsolete and "fuzzy" not in entry.flags:
            lines += [entry.msgstr, *entry.msgstr_plural.values()]
    return "\n".join(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _fluent(text: str, where: str) -> Iterator[tuple[str, str]]:
    from fluent.syntax import FluentParser, ast, visitor

    class Texts(visitor.Visitor):
        def visit_TextElement(self, node: Any) -> None:  # noqa: N802 (the library's name)
            lines.append(node.value.strip())

    lines: list[str] = []
    texts = Texts()
    for entry in FluentParser().parse(text).body:
        if isinstance(entry, ast.Message | ast.Term):
            texts.visit(entry)
    yield "", "\n".join(line for line in lines if _is_sentence(line))


def _mallard(text: str, where: str) -> Iterator[tuple[str, str]]:
    from xml.etree import ElementTree

    try:
        root = ElementTree.fromstring(text.encode())
    except ElementTree.ParseError as error:
        raise InputError(f"{where}: not a valid Mallard page: {error}") from None
    blocks = {"title", "p", "code", "screen"}
    lines = [
        " ".join("".join(element.itertext()).split())
        for element in root.iter()
        if element.tag.rpartition("}")[2] in blocks
    ]
    yield "", "\n".join(line for line in lines if line)


def _tabbed(text: str, where: str) -> Iterator[tuple[str, str]]:
    return _table(text, where, separator="\t")


_READERS = {
    ".md": _markdown,
    ".mdx": _markdown,
    ".rst": _plain,
    ".txt": _plain,
    ".html": _html,
    ".htm": _html,
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _table,
    ".tsv": _tabbed,
    ".po": _po,
    ".ftl": _fluent,
    ".page": _mallard,
}
