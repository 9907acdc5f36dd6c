"""Personal data: found by form and checked by rule, then masked.

- e-mail addresses (RFC 5322's dot-atoms), unless reserved for examples (RFC 2606);
- phone numbers, Korean ones and international ones with ``+``, that libphonenumber calls valid;
- resident registration numbers of Korea, with a birth date and a check digit that are right
  (python-stdnum), or of people registered since October 2020, whose numbers have no check digit;
- card numbers of 13 to 19 digits with Luhn's check digit (ISO/IEC 7812-1), of a major network;
- public IPv4 addresses (RFC 6890), unless they look like a version or the number of a section.

What has neither a form nor a check, such as names and street addresses, is not found.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

CONTEXT = 60  # characters on each side of what was masked, in a sample


@dataclass(frozen=True)
class Kind:
    """A kind of personal data: what stands in its place, its form and its check."""

    name: str
    form: re.Pattern[str]
    check: Callable[[str], bool]

    @property
    def mask(self) -> str:
        """What a match becomes."""
        return f"[{self.name}]"


def _is_email(text: str) -> bool:
    domain = text.rpartition("@")[2].lower()
    labels = domain.split(".")
    reserved = labels[-1] in {"test", "example", "invalid", "localhost"}
    return not (reserved or ".".join(labels[-2:]) in {"example.com", "example.org", "example.net"})


def _is_resident_number(text: str) -> bool:
    from stdnum.kr import rrn

    digits = re.sub(r"\D", "", text)
    if rrn.is_valid(digits, allow_future=False):
        return True
    century = {"1": 1900, "2": 1900, "3": 2000, "4": 2000, "5": 1900, "6": 1900}
    year = century.get(digits[6], 2000 if digits[6] in "78" else 1800) + int(digits[:2])
    try:
        return date(2020, 10, 1) <= datetime(year, int(digits[2:4]), int(digits[4:6])).date()
    except ValueError:
        return False


def _is_card(text: str) -> bool:
    from stdnum import luhn

    digits = re.sub(r"\D", "", text)
    return len(set(digits)) > 1 and luhn.is_valid(digits)


def _is_phone(text: str) -> bool:
    import phonenumbers

    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(text, "KR"))
    except phonenumbers.NumberParseException:
        return False


def _is_public_address(text: str) -> bool:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    section = all(len(part) == 1 for part in text.split("."))  # of a manual: 6.3.4.2
    return address.is_global and not address.is_multicast and not section


def _form(pattern: str) -> re.Pattern[str]:
    """ASCII only: a Korean particle that follows a number is no part of it."""
    return re.compile(pattern, re.ASCII)


KINDS = (
    Kind(
        "EMAIL",
        _form(
            r"(?<![\w.%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b"
        ),
        _is_email,
    ),
    Kind(
        "RESIDENT_NUMBER",
        _form(r"(?<![\w.-])\d{2}(?:0\d|1[0-2])[0-3]\d ?-? ?[1-8]\d{6}(?![\w.-]*\d)"),
        _is_resident_number,
    ),
    Kind(
        "CARD",
        _form(
            r"(?<![\w.-])(?:[45]\d{3}|6(?:011|5\d\d)|35\d\d|9\d{3}|2[2-7]\d\d)"
            r"(?:([ -]?)\d{4}\1\d{4}\1\d{4}|\d{9})(?![\w.-]*\d)"
            r"|(?<![\w.-])3[47]\d{2}([ -]?)\d{6}\2\d{5}(?![\w.-]*\d)"
        ),
        _is_card,
    ),
    Kind(
        "PHONE",
        _form(
            r"(?<![\w.+/=-])(?:"
            r"(?:\+82[ .-]?|\(?0)(?:2|[3-6][1-5]|70|1[016-9])[) .-]{1,2}\d{3,4}[ .-]\d{4}"
            r"|01[016-9]\d{7,8}"
            r"|\+[1-9]\d{0,2}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}"
            r")(?![\w-]*\d)"
        ),
        _is_phone,
    ),
    Kind(
        "IP",
        _form(r"(?<![\w.=/-])(?<![vV] )(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)"),
        _is_public_address,
    ),
)


@dataclass(frozen=True)
class Masked:
    """A text without its personal data, how much of each kind there was, and a few contexts."""

    text: str
    counts: dict[str, int]
    samples: list[tuple[str, str]]


def mask(text: str, samples: int = 1) -> Masked:
    """``text`` with every finding replaced by its kind in brackets.

    ``samples`` contexts of each kind are given back, themselves masked.
    """
    counts: dict[str, int] = {}
    if any(character.isdigit() for character in text) or "@" in text:
        for kind in KINDS:
            text, found = _replace(text, kind)
            if found:
                counts[kind.name] = found
    contexts = []
    for kind in KINDS if counts else ():
        if kind.name in counts:
            for match in list(re.finditer(re.escape(kind.mask), text))[:samples]:
                start, stop = max(0, match.start() - CONTEXT), match.end() + CONTEXT
                contexts.append((kind.name, " ".join(text[start:stop].split())))
    return Masked(text, counts, contexts)


def _replace(text: str, kind: Kind) -> tuple[str, int]:
    found = 0

    def replacement(match: re.Match[str]) -> str:
        nonlocal found
        if not kind.check(match.group()):
            return match.group()
        found += 1
        return kind.mask

    return kind.form.sub(replacement, text), found


class MaskPersonalData(PipelineStep):  # type: ignore[misc]
    """Masks personal data and notes, in the metadata, how much of each kind there was."""

    type = "✂️ - FORMAT"
    name = "personal data"

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Mask every document of ``data``."""
        for doc in data:
            masked = mask(doc.text)
            doc.text = masked.text
            doc.metadata["personal_data"] = json.dumps(masked.counts)
            doc.metadata["personal_samples"] = json.dumps(masked.samples, ensure_ascii=False)
            yield doc
