"""Attention over documents packed end to end into one row, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from seodang.errors import InputError

ATTENTION = "seodang_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a pack, as transformers calls it.

    ``query`` is (1, heads, T, head), ``key`` and ``value`` may have fewer heads; gives
    (1, T, heads, head).
    """
    assert attention_mask is None
    value_dims, dtype = value.shape[-1], value.dtype
    on_cpu = value.device.type == "cpu"
    if on_cpu and value_dims < query.shape[-1]:
        # PyTorch's fused attention on a CPU takes heads of one size only: half the time at 1,024
        # tokens of latent attention, whose values are smaller than its keys.
        value = pad(value, (0, query.shape[-1] - value_dims))
    if on_cpu and dtype == torch.bfloat16:
        # Of 40 to 100 tokens its bfloat16 takes three to five times as long as its float32.
        query, key, value = query.float(), key.float(), value.float()
    parts = zip(
        *(tensor.split(list(document_lengths), dim=2) for tensor in (query, key, value)),
        strict=True,
    )
    grouped = key.shape[1] != query.shape[1]
    attended = []
    for query_part, key_part, value_part in parts:
        mask = None
        if sliding_window is not None and query_part.shape[2] > sliding_window:
            whole = torch.ones(query_part.shape[2], query_part.shape[2], dtype=torch.bool)
            mask = whole.tril().triu(1 - sliding_window).to(query.device)
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            found = scaled_dot_product_attention(
                query_part,
                key_part,
                value_part,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        attended.append(found.to(dtype))
    return torch.cat(attended, dim=2)[..., :value_dims].transpose(1, 2), None


def use_packed_attention(model: Any) -> None:
    """Let ``model`` take packs; raises ``InputError`` if its attention cannot be exchanged."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    try:
        model.set_attn_implementation(ATTENTION)
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{type(model).__name__}: its attention cannot keep packed sequences apart ({error})"
        ) from None
