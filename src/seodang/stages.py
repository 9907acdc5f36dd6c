"""The stages of a run: a directory that one recipe holds, and the artifacts made in it in order.

Each stage is an artifact; one whose inputs and config did not change is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from seodang.artifact import MANIFEST, Artifact, write_atomically
from seodang.errors import InputError
from seodang.progress import say

RECIPE = "recipe.json"
LOCK = ".lock"


class Named(Protocol):
    """A recipe, of whatever kind."""

    @property
    def name(self) -> str: ...  # noqa: D102

    def model_dump_json(self, *, indent: int | None = None) -> str: ...  # noqa: D102


class Stages:
    """Makes the artifacts of the run in ``out``, and says of each whether there was work to do."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.done: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str, make: Callable[[Path], Artifact]) -> Artifact:
        """The artifact that ``make`` leaves in the folder ``name``."""
        manifest = self.out / name / MANIFEST
        before = manifest.stat().st_mtime_ns if manifest.exists() else None
        artifact = make(self.out / name)
        ran = manifest.stat().st_mtime_ns != before
        self.done[name] = {"digest": artifact.digest, "ran": ran}
        mark = "[green]done[/]" if ran else "[dim]unchanged[/]"
        say(f"{name:<14} {mark}  [dim]{artifact.digest[:12]}[/]", markup=True)
        return artifact


def say_if_nothing_ran(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell people when a run had nothing to do; ``stages`` as :class:`Stages` keeps them."""
    if not any(stage["ran"] for stage in stages.values()):
        say("Nothing to do: no input and no key of the recipe changed since the last run.")


@contextmanager
def claimed(recipe: Named, out: Path, work: str = "run") -> Iterator[None]:
    """Hold ``out`` for this recipe; raises ``InputError`` if it is not its, or is at work."""
    _claim(recipe, out)
    try:
        with FileLock(out / LOCK, timeout=0):
            yield
    except Timeout:
        raise InputError(f"{out}: another {work} is at work here") from None


def _claim(recipe: Named, out: Path) -> None:
    """Make ``out`` this recipe's directory, or refuse one that is not."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a directory")
    note = out / RECIPE
    if note.exists():
        try:
            owner = json.loads(note.read_bytes())["name"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{note}: cannot be read; choose another --out") from None
        if owner != recipe.name:
            raise InputError(
                f"{out}: belongs to the recipe {owner!r}, not {recipe.name!r}; choose another --out"
            )
    elif out.exists() and {child.name for child in out.iterdir()} - {"signing.key", "signing.pub"}:
        raise InputError(f"{out}: not empty and not a run of Seodang; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(note, recipe.model_dump_json(indent=1).encode() + b"\n")
