"""Making task files out of packages: what the scripts ``recipes/*/make_tasks.py`` share.

Each script reads the packages that ``packages.yaml`` beside it pins, and writes two files of a
task, ``NAME.train.jsonl`` and ``NAME.held-out.jsonl`` (:mod:`seodang.corpus.tasks`). What a script
makes up itself it labels synthetic, line by line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from seodang.corpus.documents import Document, content_id
from seodang.corpus.split import clusters
from seodang.corpus.tasks import Example, Turn
from seodang.errors import InputError
from seodang.packages import Package, PackagePin, open_package
from seodang.recipe import Language


def example(
    user: str,
    answer: str,
    *,
    language: Language,
    source: str,
    license: str,
    synthetic: bool,
    system: str | None = None,
    choices: Sequence[str] | None = None,
    group: str | None = None,
    relevance: int | None = None,
) -> Example:
    """An example whose id comes from what is asked and answered.

    Raises ``ValueError`` if the question is empty or the answer is not among the choices.
    """
    if not user.strip():
        raise ValueError(f"an empty question, answered {answer!r}")
    if choices is not None and answer not in choices:
        raise ValueError(f"{answer!r} is none of {choices}")
    turns = [Turn(role="system", content=system)] if system else []
    turns.append(Turn(role="user", content=user))
    asked = [turn.model_dump() for turn in turns]
    return Example(
        id=content_id({"messages": asked, "answer": answer}),
        messages=turns,
        answer=answer,
        choices=None if choices is None else list(choices),
        language=language,
        group=group,
        relevance=relevance,
        source=source,
        license=license,
        synthetic=synthetic,
    )


def user_text(asked: Example) -> str:
    """What the user says: by this examples are compared, unless told otherwise."""
    return asked.messages[-1].content


def apart(
    train: Iterable[Example],
    held_out: Iterable[Example],
    text: Callable[[Example], str] = user_text,
    threshold: float = 0.7,
) -> tuple[list[Example], list[Example]]:
    """Both sides without repeats, and the train side without near-duplicates of the held-out one.

    Near-duplicates share at least ``threshold`` (Jaccard) of their runs of three words
    (:func:`seodang.corpus.split.clusters`). The first of several that ask the same is kept.
    """
    measured, learned = _distinct(held_out, text), _distinct(train, text)
    documents = [
        Document(id=str(i), source="", license="", origin="", text=key)
        for i, key in enumerate([*measured, *(key for key in learned if key not in measured)])
    ]
    near: set[str] = set()
    for cluster in clusters(documents, threshold):
        if any(int(document.id) < len(measured) for document in cluster.documents):
            near.update(document.text for document in cluster.documents)
    return [e for key, e in learned.items() if key not in near], [*measured.values()]


def _distinct(examples: Iterable[Example], text: Callable[[Example], str]) -> dict[str, Example]:
    """The first example of every text, whatever its case and spacing."""
    first: dict[str, Example] = {}
    for asked in examples:
        first.setdefault(" ".join(text(asked).casefold().split()), asked)
    return first


def write_task(
    folder: Path,
    name: str,
    train: Iterable[Example],
    held_out: Iterable[Example],
    labelled: int = 1,
) -> None:
    """Write both sides of a task, or the one that has examples.

    One of ``labelled`` examples to train on keeps its answer; the others become requests, which
    wait for the teacher's. Raises ``ValueError`` for a question that stands twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    learned = [*train]
    requests = [asked for number, asked in enumerate(learned) if number % labelled]
    sides = {"train": learned[::labelled], "requests": requests, "held-out": [*held_out]}
    for side, examples in sides.items():
        if not examples:
            continue
        for asked in examples:
            if user_text(asked) in seen:
                raise ValueError(f"{name}: asked twice: {user_text(asked)!r}")
            seen.add(user_text(asked))
        unknown = {"answer", "relevance"} if side == "requests" else None
        lines = [asked.model_dump(exclude_none=True, exclude=unknown) for asked in examples]
        write_lines(folder / f"{name}.{side}.jsonl", lines)


def write_lines(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records as JSON Lines."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    file.write_text("".join(lines), encoding="utf-8", newline="\n")


def script_options(about: str, quick: str) -> argparse.Namespace:
    """The options that every script has: ``out``, and whether it shall be ``quick``."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser.parse_args()


def read_pins(file: Path) -> list[PackagePin]:
    """The packages that a ``packages.yaml`` pins.

    Raises ``InputError`` if the file is not a list of pins.
    """
    try:
        return TypeAdapter(list[PackagePin]).validate_python(
            yaml.safe_load(file.read_text("utf-8"))
        )
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InputError(f"{file}: not a list of package pins: {error}") from None


def open_packages(file: Path) -> dict[str, Package]:
    """Every package that ``file`` pins, by name; raises ``InputError`` for one not fetched."""
    return {pin.package: open_package(pin) for pin in read_pins(file)}
