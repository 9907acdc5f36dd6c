"""Sequences as one HTML file that loads nothing: hover, focus or tap a token for its label."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seodang import __version__
from seodang.pages import page_environment
from seodang.softlabels.estimators import BIASED
from seodang.softlabels.spelling import Spelling, laid_out, named, visible
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore
from seodang.softlabels.surprise import (
    BANDS,
    COLOURS,
    INK,
    Entry,
    Label,
    ShownToken,
    labels,
    percent,
    shown_tokens,
    surprise_in_words,
)

TEMPLATE = "show.html.j2"


@dataclass(frozen=True)
class ShownSequence:
    """A sequence as the page shows it; ``end`` is the label after its last token, if any."""

    number: int
    document_id: str
    tokens: list[ShownToken]
    end: Label | None
    summary: str


def _shown(store: SoftLabelStore, number: int, spelling: Spelling, top: int) -> ShownSequence:
    sequence = store[number]
    found = list(labels(sequence, store.header, spelling, top))
    return ShownSequence(
        number=number,
        document_id=sequence.document_id,
        tokens=shown_tokens(sequence, found, spelling),
        end=found[-1] if found and found[-1].came is None else None,
        summary=_summary(sequence, found),
    )


def _summary(sequence: SoftLabelSequence, found: Sequence[Label]) -> str:
    came = [label for label in found if label.came is not None]
    beyond = sum(label.surprise is None for label in came)
    parts = [f"{len(sequence.token_ids):,} tokens, {len(found):,} labels"]
    if found:
        parts.append(f"mean entropy {float(np.mean(sequence.entropy)):.2f} nats")
    if came:
        parts.append(f"{beyond:,} of {len(came):,} tokens beyond the stored ids")
    return " · ".join(parts)


def render(store: SoftLabelStore, numbers: Sequence[int], spelling: Spelling, top: int) -> str:
    """The page of the sequences ``numbers``, each label with its ``top`` largest entries.

    Everything from the store is shown as text, never as markup; equal input gives equal bytes.
    """
    folder = Path(__file__).parent
    script = (folder / "show.js").read_text(encoding="utf-8")
    environment = page_environment(folder)
    environment.filters["visible"] = visible
    environment.filters["laid_out"] = laid_out
    environment.filters["percent"] = percent
    environment.filters["surprise"] = surprise_in_words
    return environment.get_template(TEMPLATE).render(
        version=__version__,
        store=store,
        biased=store.estimator in BIASED,
        estimates=store.estimator not in BIASED,
        sequences=[_shown(store, number, spelling, top) for number in numbers],
        separator=spelling.separator,
        named=named,
        entries=_entries,
        bands=BANDS,
        colours=COLOURS,
        ink=INK,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _entries(label: Label) -> list[Entry]:
    """The entries that a label shows: its largest, and the one that came if it holds it."""
    came = label.came
    if came is None or came.weight == 0 or came.id in {entry.id for entry in label.largest}:
        return label.largest
    return [*label.largest, came]
