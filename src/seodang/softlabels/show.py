"""A sequence's soft labels in a form that people read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from seodang.softlabels.store import SoftLabelSequence


def label_rows(
    sequence: SoftLabelSequence, spell: Callable[[int], str], positions: int, top: int
) -> list[dict[str, Any]]:
    """The first labelled positions: token, entropy in nats and the ``top`` largest weights."""
    rows = []
    for index, position in enumerate(sequence.labelled[:positions].tolist()):
        part = slice(sequence.offsets[position], sequence.offsets[position + 1])
        ids, weights = sequence.ids[part], sequence.weights[part]
        largest = np.argsort(-weights, kind="stable")[:top]
        rows.append(
            {
                "position": position,
                "token": spell(int(sequence.token_ids[position])),
                "entropy": float(sequence.entropy[index]),
                "entries": [
                    {"id": int(ids[i]), "token": spell(int(ids[i])), "weight": float(weights[i])}
                    for i in largest
                ],
            }
        )
    return rows
