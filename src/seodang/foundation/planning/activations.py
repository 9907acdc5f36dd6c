"""Bytes that the forward pass of one token leaves behind for the backward pass, by layer.

Counted tensor by tensor, in the manner of Korthikanti et al. (arXiv 2205.05198, section 4.1), for
multi-head latent attention, gated MLPs and routed experts. Attention is a kernel that does not keep
its matrix (FlashAttention, arXiv 2205.14135): nothing here grows with the square of the sequence.

``transformers`` keeps what the library's modules keep, which was measured with saved-tensor hooks;
``fused`` what remains where norms, SwiGLU and cross-entropy are single kernels, as in
Megatron-Core with Transformer Engine.
"""

from __future__ import annotations

from typing import Literal

from seodang.foundation.model_config import ModelConfig

Kernels = Literal["transformers", "fused"]
FLOAT32 = 4


def _norm(width: int, size: int, kernels: Kernels) -> int:
    """Input and output of an RMSNorm; ``transformers`` keeps a float32 input and one value more."""
    if kernels == "fused":
        return 2 * width * size + FLOAT32
    return width * (FLOAT32 + 2 * size) + FLOAT32


def _attention(c: ModelConfig, size: int, kernels: Kernels) -> int:
    norms = sum(_norm(width, size, kernels) for width in (c.hidden_size, c.q_lora_rank))
    latent = _norm(c.kv_lora_rank, size, kernels) + c.qk_rope_head_dim * FLOAT32
    queries_and_keys = 2 * c.heads * c.qk_head_dim * size
    # The values are a view of what they were projected with, which holds the keys' part as well.
    values = c.heads * (c.qk_nope_head_dim + c.v_head_dim) * size
    output = c.heads * (c.v_head_dim * size + FLOAT32)  # and the logarithm of each row's sum
    return norms + latent + queries_and_keys + values + output


def _gated_mlp(neurons: int, size: int, kernels: Kernels) -> int:
    """Gate, up and their product; ``transformers`` also keeps the gate's activation."""
    return neurons * size * (4 if kernels == "transformers" else 3)


def _routing(c: ModelConfig) -> int:
    """Which groups and experts were chosen, the mask of the others, and the order of the tokens."""
    indices = 2 * c.groups + c.groups_per_token + 4 * c.experts_per_token  # of eight bytes
    return 8 * indices + c.experts + 3 * FLOAT32 * c.experts_per_token


def layer_bytes(config: ModelConfig, kind: str, size: int, kernels: Kernels) -> int:
    """Bytes that one token leaves in a layer.

    Args:
        config: the model's shape.
        kind: ``dense``, ``sparse``, ``mtp`` (a sparse layer that predicts), ``head`` (final norm,
            logits, cross-entropy) or ``embedding`` (nothing).
        size: bytes of a value that products are computed with: 2 for bfloat16, 4 for float32.
        kernels: of the library's modules, or fused.
    """
    c = config
    width = c.hidden_size
    if kind == "embedding":
        return 0
    if kind == "head":
        logits = c.vocabulary * (FLOAT32 if kernels == "transformers" else size)
        return _norm(width, size, kernels) + logits
    if kind == "dense":
        mlp = _gated_mlp(c.intermediate_size, size, kernels)
        return _attention(c, size, kernels) + _norm(width, size, kernels) + mlp
    routed = c.experts_per_token * (
        width * size + _gated_mlp(c.expert_intermediate_size, size, kernels)
    )
    shared = _gated_mlp(c.shared_experts * c.expert_intermediate_size, size, kernels)
    router = c.experts * FLOAT32
    after = width * size
    if kernels == "transformers":
        routed += c.experts_per_token * width * size  # outputs, until they are weighted
        router += 0 if size == FLOAT32 else width * FLOAT32  # its input in float32
        router += _routing(c)
        after += width * FLOAT32
    sparse = (
        _attention(c, size, kernels)
        + _norm(width, size, kernels)
        + router
        + routed
        + shared
        + after
    )
    if kind == "mtp":
        return sparse + 2 * _norm(width, size, kernels) + layer_bytes(c, "head", size, kernels)
    assert kind == "sparse", kind
    return sparse


def checkpoint_bytes(config: ModelConfig, size: int) -> int:
    """Bytes of one token in a layer whose activations are recomputed: the layer's input.

    Source: Korthikanti et al., arXiv 2205.05198, section 4.1 and table 2 (full recomputation).
    """
    return config.hidden_size * size
