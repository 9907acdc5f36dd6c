"""The document: plain text or a conversation, and where it came from."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from seodang.artifact import canonical_json, sha256_bytes

ROLES = ("system", "user", "assistant")

_TRAILING_SPACE = re.compile(r"[ \t]+$", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """One document: ``messages`` (``role`` and ``content`` each) or, without them, ``text``.

    ``compared`` is what near-duplicates are told by, if that is not all of its words. ``synthetic``
    if it was generated.
    """

    id: str
    source: str
    license: str
    origin: str
    text: str = ""
    messages: list[dict[str, str]] | None = None
    compared: str | None = None
    synthetic: bool = False

    @property
    def content(self) -> str:
        """All of the document's words: its text, or the contents of its messages in order."""
        return self.text if self.messages is None else joined(self.messages)

    @property
    def body(self) -> dict[str, Any]:
        """``{"text": ...}`` or ``{"messages": ...}``: the document without its provenance."""
        return {"text": self.text} if self.messages is None else {"messages": self.messages}


def joined(messages: list[dict[str, str]]) -> str:
    """The contents of a conversation, one after the other."""
    return "\n".join(message["content"] for message in messages)


def content_id(body: dict[str, Any]) -> str:
    """An identity of a document that depends on nothing but its ``body``: 16 hex digits."""
    return sha256_bytes(canonical_json(body))[:16]


def normalise(text: str) -> str:
    """NFC, LF line ends, no NULs, no space at the ends of lines, no blank first or last lines."""
    text = unicodedata.normalize("NFC", text).replace("\0", "")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _TRAILING_SPACE.sub("", text).strip("\n")
