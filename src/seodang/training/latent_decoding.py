"""Latent attention (MLA) for one new token at a time, without expanding its cache.

The cache of A.X K1 and DeepSeek-V3 holds a small latent vector for each token; `transformers`
expands all of them to keys and values for every new token. Here the query goes to the latents
instead: its part without positions is multiplied by the expansion's key half, and what is attended
is a sum of latents, expanded once (DeepSeek-V2's "absorption": arXiv 2405.04434, section 2.1.2).
The result is the same but for rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

LATENT_ATTENTION = {"AXK1Attention", "DeepseekV3Attention"}  # of transformers


def use_latent_decoding(model: Any) -> None:
    """Let the latent attention of ``model`` (of `transformers`) generate so, in place."""
    for module in model.modules():
        if type(module).__name__ in LATENT_ATTENTION:
            module.forward = partial(_forward, module, module.forward)


def _forward(
    attention: Any,
    usual: Callable[..., tuple[torch.Tensor, Any]],
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """What ``AXK1Attention.forward`` gives; B sequences, H heads, L cached tokens, latents of R."""
    one_more = past_key_values is not None and hidden_states.shape[1] == 1
    masked = attention_mask is None or attention_mask.ndim == 4
    if not one_more or not masked or torch.is_grad_enabled():
        return usual(hidden_states, position_embeddings, attention_mask, past_key_values, **options)
    a = attention
    count, heads, rank = len(hidden_states), a.num_heads, a.kv_lora_rank
    query = (
        a.q_proj(hidden_states)
        if a.q_lora_rank is None
        else a.q_b_proj(a.q_a_layernorm(a.q_a_proj(hidden_states)))
    )
    query_BH1D = query.view(count, 1, heads, a.qk_head_dim).transpose(1, 2)
    plain_BH1N, turned_BH1P = query_BH1D.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
    latent, place = a.kv_a_proj_with_mqa(hidden_states).split([rank, a.qk_rope_head_dim], dim=-1)
    latent_B11R = a.kv_a_layernorm(latent)[:, None]
    library = sys.modules[type(attention).__module__]
    interleaved = a.config.rope_interleave
    rotate = getattr(library, "apply_rotary_pos_emb" + ("_interleave" if interleaved else ""))
    turned_BH1P, place_B11P = rotate(turned_BH1P, place[:, None], *position_embeddings)
    latent_B1LR, place_B1LP = past_key_values.update(latent_B11R, place_B11P, a.layer_idx)

    expansion_HER = a.kv_b_proj.weight.view(heads, a.qk_nope_head_dim + a.v_head_dim, rank)
    to_key_HNR, to_value_HVR = expansion_HER.split([a.qk_nope_head_dim, a.v_head_dim], dim=1)
    latent_BLR, place_BLP = latent_B1LR[:, 0], place_B1LP[:, 0]
    # By hand: PyTorch's fused attention does not take a value smaller than its key, and the other
    # one copies keys and values for every head.
    score_BHL = (plain_BH1N @ to_key_HNR)[:, :, 0] @ latent_BLR.mT
    score_BHL = torch.baddbmm(score_BHL, turned_BH1P[:, :, 0], place_BLP.mT).mul_(a.scaling)
    if attention_mask is not None:
        mask_B1L = attention_mask[:, :, 0, : score_BHL.shape[2]]
        if mask_B1L.dtype == torch.bool:
            score_BHL.masked_fill_(~mask_B1L, -torch.inf)
        else:
            score_BHL += mask_B1L
    attended_BHR = score_BHL.softmax(-1) @ latent_BLR
    said_BH1V = attended_BHR[:, :, None] @ to_value_HVR.mT
    return a.o_proj(said_BH1V.reshape(count, 1, -1)), None
