"""Floating-point operations of one token, forward and in training, by component.

A product of an (m, k) by a (k, n) matrix counts 2·m·k·n. Norms, activations, rotary embedding and
softmax are left out, as is usual (Kaplan et al., arXiv 2001.08361, section 2.1): they are
well below one percent.
"""

from __future__ import annotations

from seodang.foundation.model_config import ModelConfig
from seodang.foundation.planning.parameters import attention_projections, gated_mlp

BACKWARD = 2  # times the forward pass: gradients of inputs and of weights (arXiv 2001.08361, 2.1)


def mean_attended(context: int, *, causal: bool = True) -> float:
    """Positions that a token attends to, on average over a sequence of ``context`` tokens."""
    return (context + 1) / 2 if causal else float(context)


def attention_scores(config: ModelConfig, attended: float) -> float:
    """Forward FLOPs of one layer's scores and weighted sums, for one token.

    Scores take 2·(qk_nope + qk_rope) a head and attended position, sums 2·v: the quadratic part.
    Source: PaLM, arXiv 2204.02311, appendix B (there with one width for both).
    """
    return 2 * config.heads * (config.qk_head_dim + config.v_head_dim) * attended


def forward_flops(config: ModelConfig, context: int, *, causal: bool = True) -> dict[str, float]:
    """Forward FLOPs of one token by component, in sequences of ``context`` tokens.

    ``causal``: count only pairs that the mask leaves; otherwise the whole square, which is what
    attention computes where its kernel does not skip what is masked.
    """
    c = config
    expert = gated_mlp(c, c.expert_intermediate_size)
    return {
        "attention projections": 2.0 * c.layers * attention_projections(c),
        "attention scores": c.layers * attention_scores(c, mean_attended(context, causal=causal)),
        "dense MLP": 2.0 * c.dense_layers * gated_mlp(c, c.intermediate_size),
        "routed experts": 2.0 * c.moe_layers * c.experts_per_token * expert,
        "shared experts": 2.0 * c.moe_layers * c.shared_experts * expert,
        "router": 2.0 * c.moe_layers * c.hidden_size * c.experts,
        "output head": 2.0 * c.hidden_size * c.vocabulary,
    }


def mtp_flops(config: ModelConfig, context: int) -> float:
    """Forward FLOPs of one token in the multi-token-prediction layers, which only train.

    Each is a MoE layer, a projection of twice the width, and the output head once more
    (DeepSeek-V3, arXiv 2412.19437, section 2.2).
    """
    c = config
    expert = gated_mlp(c, c.expert_intermediate_size)
    weights = (
        attention_projections(c)
        + (c.experts_per_token + c.shared_experts) * expert
        + c.hidden_size * (c.experts + 2 * c.hidden_size + c.vocabulary)
    )
    return c.mtp_layers * (2 * weights + attention_scores(c, mean_attended(context)))


def training_flops(config: ModelConfig, context: int) -> float:
    """FLOPs of one token in training: forward and backward, multi-token prediction included.

    What activation recomputation repeats is not counted: these are the model's FLOPs, which model
    FLOPs utilisation is about (PaLM, arXiv 2204.02311, section 4.1).
    """
    forward = sum(forward_flops(config, context).values()) + mtp_flops(config, context)
    return (1 + BACKWARD) * forward
