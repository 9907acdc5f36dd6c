"""The loss of one batch of soft-label sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from seodang.causal_lm import pad
from seodang.corpus.sequences import observed_tokens
from seodang.softlabels.store import SoftLabelSequence
from seodang.student.losses import LossTerms, sparse_kd_terms

Objective = Literal["soft-labels", "cross-entropy"]


def batch_loss(
    model: Any,
    batch: Sequence[SoftLabelSequence],
    objective: Objective,
    ce_weight: float,
    residual: bool = False,
) -> LossTerms:
    """The loss of one batch; the head sees labelled positions only.

    ``residual`` for labels of the `residual` estimator, whose loss has a bucket for the rest.
    """
    device = model.device
    ids = pad([sequence.token_ids for sequence in batch]).to(device)
    hidden_BTH = model.base_model(ids, use_cache=False).last_hidden_state
    rows = np.concatenate([np.full(len(s.labelled), i) for i, s in enumerate(batch)])
    columns = np.concatenate([s.labelled for s in batch])
    hidden_NH = hidden_BTH[torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)]
    targets = np.concatenate([observed_tokens(s) for s in batch])
    counts = np.concatenate([np.diff(s.offsets)[s.labelled] for s in batch])
    entry_ids = np.concatenate([s.ids for s in batch])
    entry_weights = np.concatenate([s.weights for s in batch])
    if objective == "cross-entropy":
        counts, entry_ids, entry_weights = counts * 0, entry_ids[:0], entry_weights[:0]
        ce_weight, residual = 1.0, False
    head = model.get_output_embeddings()
    return sparse_kd_terms(
        hidden_NH,
        head.weight,
        torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])).to(device),
        torch.from_numpy(entry_ids).to(device),
        torch.from_numpy(entry_weights).to(device),
        cross_entropy_targets=torch.from_numpy(targets).to(device),
        cross_entropy_weight=ce_weight,
        bias=getattr(head, "bias", None),
        residual=residual,
    )
