"""A generated problem with a checkable answer, in words and with the thoughts that lead to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from seodang.recipe import Language

Mode = Literal["think", "instant"]
LANGUAGES: tuple[Language, ...] = ("ko", "en")
MODES: tuple[Mode, ...] = ("think", "instant")
VARIANTS = 2  # wordings of the same question in a language


@dataclass(frozen=True)
class Worded:
    """A problem in a language: what is asked, what is thought, and what is answered."""

    question: str
    thoughts: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A generator of reasoning-gym with its parameters, our words for it, and a reader of answers.

    ``word`` takes an entry of the generator, a language and the number of a wording. ``read``
    writes an answer in one of our languages as the generator's own verifier reads it.
    """

    generator: str
    parameters: dict[str, Any]
    word: Callable[[dict[str, Any], Language, int], Worded]
    read: Callable[[str, dict[str, Any], Language], str] = lambda answer, entry, language: answer
