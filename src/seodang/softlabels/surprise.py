"""A sequence as people read it: each token, and how much it surprised the teacher.

The label of position t is held against token t + 1, so a token is coloured by the label before it.
Where that label does not hold the token, all that is known is that it lies beyond the stored ids:
no number stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from seodang.softlabels.observed import drawn
from seodang.softlabels.shards import StoreHeader
from seodang.softlabels.spelling import Spelling
from seodang.softlabels.store import SoftLabelSequence

# The colour scale: bands of the weight that a label gives to the token that came. A band holds
# what is at least its number; the last one is of tokens that the label does not hold.
BANDS = (
    (0.5, "≥ 50 %"),
    (0.2, "20–50 %"),
    (0.05, "5–20 %"),
    (0.01, "1–5 %"),
    (0.0, "< 1 %"),
    (-1.0, "beyond the stored ids"),
)

# (light, dark) background of each band, and the text on it: contrast of at least 4.5.
COLOURS = (
    ("#ffffff", "#1a222b"),
    ("#fdf0bd", "#453d12"),
    ("#fbd08a", "#66450f"),
    ("#f5a571", "#803a16"),
    ("#ec8579", "#98282a"),
    ("#cdbcf0", "#533f8c"),
)
INK = ("#1c2733", "#f0f4f8")


@dataclass(frozen=True)
class Entry:
    """An id and its weight; ``estimate`` says that it was drawn."""

    id: int
    token: str
    weight: float
    estimate: bool


@dataclass(frozen=True)
class Label:
    """The label of a ``position``: its largest entries, by falling weight, of ``stored`` ones.

    ``came`` is the token after it, with the weight 0 if the label does not hold it, and None if
    the sequence ends. ``entropy`` is the teacher's, in nats.
    """

    position: int
    came: Entry | None
    entropy: float
    stored: int
    largest: list[Entry]

    @property
    def surprise(self) -> float | None:
        """Minus the logarithm of the weight, in nats; None if nothing came, or nothing stored."""
        if self.came is None or self.came.weight <= 0:
            return None
        return max(0.0, -math.log(self.came.weight))

    @property
    def band(self) -> int:
        """Index into ``BANDS`` of the token that came."""
        weight = self.came.weight if self.came is not None and self.came.weight > 0 else -1.0
        return next(index for index, (least, _) in enumerate(BANDS) if weight >= least)


@dataclass(frozen=True)
class ShownToken:
    """A token; ``expected`` is the label before it, None if that position has none."""

    position: int
    id: int
    text: str
    expected: Label | None


def labels(
    sequence: SoftLabelSequence, header: StoreHeader, spelling: Spelling, top: int
) -> Iterator[Label]:
    """The labels of a sequence in order, each with its ``top`` largest entries."""
    estimates = drawn(header, sequence.weights)

    def entry(index: int) -> Entry:
        token = int(sequence.ids[index])
        weight, estimate = float(sequence.weights[index]), bool(estimates[index])
        return Entry(token, spelling.token(token), weight, estimate)

    for row, position in enumerate(sequence.labelled.tolist()):
        start, stop = sequence.offsets[position : position + 2].tolist()
        order = start + np.argsort(-sequence.weights[start:stop], kind="stable")
        came = None
        if position + 1 < len(sequence.token_ids):
            token = int(sequence.token_ids[position + 1])
            hits = start + np.flatnonzero(sequence.ids[start:stop] == token)
            came = (
                entry(int(hits[0]))
                if len(hits)
                else Entry(token, spelling.token(token), 0.0, False)
            )
        yield Label(
            position=position,
            came=came,
            entropy=float(sequence.entropy[row]),
            stored=stop - start,
            largest=[entry(index) for index in order[:top].tolist()],
        )


def shown_tokens(
    sequence: SoftLabelSequence, found: Sequence[Label], spelling: Spelling
) -> list[ShownToken]:
    """The tokens of a sequence with the labels before them."""
    before = {label.position + 1: label for label in found}
    ids = sequence.token_ids.tolist()
    return [
        ShownToken(position, token, text, before.get(position))
        for position, (token, text) in enumerate(zip(ids, spelling.text(ids), strict=True))
    ]


def percent(weight: float, estimate: bool) -> str:
    """A weight for people: two digits, and ≈ before what was drawn."""
    shown = 100 * weight
    if 0 < shown < 0.01:
        text = "<0.01 %"
    else:
        text = f"{shown:.{0 if shown >= 9.95 else 1 if shown >= 0.995 else 2}f} %"
    return f"≈ {text}" if estimate else text


def surprise_in_words(label: Label) -> str:
    """The surprise in nats, or why there is no number for it."""
    if label.came is None:
        return "the text ends"
    if label.surprise is None:
        return "beyond"
    return f"{'≈ ' if label.came.estimate else ''}{label.surprise:.2f}"
