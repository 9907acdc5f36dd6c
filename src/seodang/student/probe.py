"""A few stored soft labels on which the choices of a start are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore
from seodang.student.losses import sparse_kd_terms
from seodang.student.packing import pack

PROBE_TOKENS = 512  # labelled tokens, about


def probe_sequences(store: SoftLabelStore, tokens: int = PROBE_TOKENS) -> list[SoftLabelSequence]:
    """Sequences from all over the store, with about ``tokens`` labelled tokens."""
    wanted = max(1, round(tokens * len(store) / max(1, store.num_tokens)))
    step = max(1, len(store) // wanted)
    return [store[i] for i in range(0, len(store), step)][:wanted]


def soft_label_loss(
    model: Any, sequences: Sequence[SoftLabelSequence], *, residual: bool
) -> torch.Tensor:
    """Mean soft-label loss in nats per labelled token, differentiable in the model.

    ``residual`` for labels of the `residual` estimator, whose loss has a bucket for the rest. The
    sequences pass one by one: no padding, so that hooks see real tokens only.
    """
    head = model.get_output_embeddings()
    total, positions = torch.zeros((), device=model.device), 0
    for sequence in sequences:
        alone = pack([sequence]).to(model.device)
        hidden_TH = model.base_model(alone.ids[None], use_cache=False).last_hidden_state[0]
        terms = sparse_kd_terms(
            hidden_TH[alone.rows],
            head.weight,
            alone.offsets,
            alone.entry_ids,
            alone.weights,
            bias=getattr(head, "bias", None),
            residual=residual,
            reduction="sum",
        )
        total = total + terms.total
        positions += len(sequence.labelled)
    return total / max(1, positions)


def observe(
    model: Any,
    sequences: Sequence[SoftLabelSequence],
    modules: Sequence[str],
    see: Callable[[str, torch.Tensor, Any], None],
) -> None:
    """Pass every sequence through the model; ``see(name, input, output)`` sees the modules."""

    def hook_of(name: str) -> Callable[[Any, tuple[torch.Tensor, ...], Any], None]:
        return lambda module, given, result: see(name, given[0], result)

    hooks = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in modules]
    try:
        with torch.inference_mode():
            for sequence in sequences:
                ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
                model.base_model(ids[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
