"""The key that servers are asked with: never in a recipe, which is published."""

from __future__ import annotations

import os

VARIABLE = "SEODANG_API_KEY"


def authorization() -> dict[str, str]:
    """The header that carries the key of the environment; none if there is none.

    The variable is our own, so that a key that is meant for another service is not sent to a
    server that only a recipe names.
    """
    key = os.environ.get(VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def hint(status: int) -> str:
    """What to do about an answer with this HTTP status, where it is about a key."""
    return f"; set {VARIABLE} to the server's key" if status in (401, 403) else ""
