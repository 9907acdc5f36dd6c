"""Bytes to text: UTF-8, and what Korean files were written in before it.

UTF-8 is tried first, strictly: hardly any text in another encoding passes for it. Then CP949, which
contains EUC-KR: the text must be Korean, in syllables that EUC-KR has. Anything else is left to
charset-normalizer, which must find that the decoded text makes sense (of short lists and tables in
CP949 it often does not). What none of them can read is refused with the byte, never guessed.
"""

from __future__ import annotations

import codecs
from collections import Counter
from dataclasses import dataclass

from seodang.errors import InputError

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_KOREAN = ("cp949", "johab", "utf_16_le", "utf_16_be")
_WESTERN = ("cp1252", "latin_1", "iso8859_15", "mac_roman")
_SAMPLE = 200_000  # bytes that charset-normalizer looks at
_SYLLABLES = 0.75  # of the characters beyond ASCII; read as CP949, text of others has far fewer


@dataclass(frozen=True)
class Decoded:
    """Text and the encoding that it was read in (Python's name)."""

    text: str
    encoding: str


def decode(data: bytes, where: str, encoding: str | None = None) -> Decoded:
    """Decode a file's bytes, in ``encoding`` if that is given.

    Raises ``InputError`` with ``where``, the line and the offset of the byte: for bytes that are
    not in the given encoding, that are in no encoding that makes sense of them, or that mix UTF-8
    with another.
    """
    if encoding is not None:
        return Decoded(_strictly(data, encoding, where), encoding)
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            return Decoded(_strictly(data, name, where), name)
    try:
        return Decoded(data.decode("utf-8"), "utf-8")
    except UnicodeDecodeError as error:
        if _is_korean(data):
            return Decoded(_strictly(data, "cp949", where), "cp949")
        _refuse_mixed(data, error, where)
        found = _detected(data)
        if found is None:
            raise _refusal(data, error.start, where, "is in no encoding that makes sense") from None
        return Decoded(_strictly(data, found, where), found)


def _strictly(data: bytes, encoding: str, where: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _refusal(data, error.start, where, f"is not {encoding}") from None
    except LookupError:
        raise InputError(f"{where}: there is no encoding {encoding!r}") from None


def _is_korean(data: bytes) -> bool:
    """Whether the bytes are CP949 and nearly all of it are the 2,350 syllables of EUC-KR.

    Text in another encoding seldom is valid CP949, and if it is, gives Hanja and syllables that
    nobody writes.
    """
    try:
        text = data.decode("cp949")
    except UnicodeDecodeError:
        return False
    beyond = {character: n for character, n in Counter(text).items() if not character.isascii()}
    syllables = sum(
        n
        for character, n in beyond.items()
        if "가" <= character <= "힣" and len(character.encode("euc-kr")) == 2
    )
    return syllables >= _SYLLABLES * sum(beyond.values())


def _detected(data: bytes) -> str | None:
    from charset_normalizer import from_bytes

    sample = data[:_SAMPLE].rpartition(b"\n")[0] or data
    for candidates in (_KOREAN, _WESTERN):
        best = from_bytes(sample, cp_isolation=list(candidates)).best()
        if best is not None:
            return best.encoding
    return None


def _refuse_mixed(data: bytes, error: UnicodeDecodeError, where: str) -> None:
    """Refuse a file some of whose lines are UTF-8 beyond ASCII, and others not UTF-8 at all.

    A line in CP949 passes for UTF-8 only by rare chance, so one such line is not held against it.
    """
    utf8_lines = 0
    for line in data.splitlines():
        if not line.isascii():
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                continue
            utf8_lines += 1
            if utf8_lines == 2:
                raise _refusal(data, error.start, where, "is not UTF-8, as other lines are")


def _refusal(data: bytes, at: int, where: str, what: str) -> InputError:
    line = data.count(b"\n", 0, at) + 1
    return InputError(
        f"{where}:{line}: byte 0x{data[at]:02x} at offset {at:,} {what}; name the file's "
        "`encoding` in its source, convert it (iconv -t UTF-8), or leave it out with `exclude`"
    )
