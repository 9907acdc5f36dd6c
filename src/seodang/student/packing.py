"""Sequences packed end to end into one row, none of which sees another.

Nothing is padded: every product runs over the pack's tokens alone. What keeps the sequences apart
is the attention, computed one sequence at a time by
:func:`seodang.training.attention.packed_attention`, and positions that begin anew with each
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from seodang.corpus.sequences import observed_tokens
from seodang.training.loop import on_device

Objective = Literal["soft-labels", "cross-entropy"]


@dataclass(frozen=True)
class Pack:
    """The tokens of some sequences, and the labels of some of their positions.

    ``ids`` and ``positions`` (T,) int64; ``lengths`` of the sequences, T in sum; ``rows`` (N,)
    int64 are the labelled tokens, whose entries are [offsets[i], offsets[i+1]) of ``entry_ids``
    and ``weights``, and whose observed next tokens are ``targets`` (N,), -100 where there is none.
    It was made of ``sequences`` for ``objective``.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    rows: torch.Tensor
    offsets: torch.Tensor
    entry_ids: torch.Tensor
    weights: torch.Tensor
    targets: torch.Tensor
    sequences: Sequence[Any] = ()
    objective: Objective = "soft-labels"

    @property
    def documents(self) -> list[str]:
        """Ids of the sequences' documents."""
        return [sequence.document_id for sequence in self.sequences]

    def apart(self) -> list[Pack]:
        """A pack of each sequence."""
        return [pack([sequence], self.objective) for sequence in self.sequences]

    def to(self, device: torch.device) -> Pack:
        """The same pack on ``device``."""
        return on_device(self, device)


def pack(sequences: Sequence[Any], objective: Objective = "soft-labels") -> Pack:
    """Put sequences end to end: of soft labels, or, for "cross-entropy", any that are labelled.

    No sequence at all gives one token without labels, so that a process with nothing to do can
    still take part in a step.
    """
    if not sequences:
        nothing = torch.zeros(0, dtype=torch.int64)
        one = torch.zeros(1, dtype=torch.int64)
        return Pack(one, one, [1], nothing, one, nothing, nothing.float(), nothing)
    lengths = [len(s.token_ids) for s in sequences]
    starts = np.cumsum([0, *lengths[:-1]])
    rows = np.concatenate([s.labelled + start for s, start in zip(sequences, starts, strict=True)])
    if objective == "cross-entropy":
        counts, entry_ids = np.zeros(len(rows), np.int64), np.zeros(0, np.int32)
        weights = np.zeros(0, np.float32)
    else:
        counts = np.concatenate([np.diff(s.offsets)[s.labelled] for s in sequences])
        entry_ids = np.concatenate([s.ids for s in sequences])
        weights = np.concatenate([s.weights for s in sequences])
    return Pack(
        ids=torch.from_numpy(np.concatenate([s.token_ids for s in sequences]).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        lengths=lengths,
        rows=torch.from_numpy(rows.astype(np.int64)),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
        entry_ids=torch.from_numpy(entry_ids.astype(np.int64)),
        weights=torch.from_numpy(weights),
        targets=torch.from_numpy(np.concatenate([observed_tokens(s) for s in sequences])),
        sequences=sequences,
        objective=objective,
    )


def hidden_states(model: Any, batch: Pack) -> torch.Tensor:
    """Last hidden states of the labelled tokens, (N, H); the model uses packed attention."""
    found = model.base_model(
        batch.ids[None],
        position_ids=batch.positions[None],
        use_cache=False,
        document_lengths=batch.lengths,
    )
    hidden_TH = found.last_hidden_state[0]
    assert isinstance(hidden_TH, torch.Tensor)
    return hidden_TH[batch.rows]
