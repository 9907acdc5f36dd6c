"""A store and its sequences in a form that people read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from seodang.softlabels.estimators import BIASED
from seodang.softlabels.store import SoftLabelSequence
from seodang.softlabels.store import open as open_store


def describe(path: Path) -> dict[str, Any]:
    """What ``labels inspect`` says about the store at ``path``."""
    store = open_store(path)
    return {
        "path": str(path),
        "digest": store.artifact.digest,
        "tokens": store.num_tokens,
        "sequences": len(store),
        "bytes_per_token": store.bytes_per_token,
        **store.header.model_dump(),
        "biased": store.estimator in BIASED,
        "sources": [s.model_dump(exclude_none=True) for s in store.artifact.manifest.sources],
    }


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
