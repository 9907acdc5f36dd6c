"""Parameters of an A.X K1 model, by component: exact, and without building it.

The shapes are those of ``transformers``' ``AXK1ForCausalLM``; the multi-token-prediction layers,
which that class leaves out, are counted apart, after DeepSeek-V3 (arXiv 2412.19437, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from seodang.foundation.model_config import ModelConfig


@dataclass(frozen=True)
class Component:
    """Parameters of one kind: all of them, and those that take part in computing one token."""

    name: str
    total: int
    active: int


def attention_projections(config: ModelConfig) -> int:
    """Weights of one layer's multi-head latent attention, its two norms not among them.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 (queries, too, go through a latent).
    """
    c = config
    queries = c.hidden_size * c.q_lora_rank + c.q_lora_rank * c.heads * c.qk_head_dim
    latent = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim)
    keys_and_values = c.kv_lora_rank * c.heads * (c.qk_nope_head_dim + c.v_head_dim)
    output = c.heads * c.v_head_dim * c.hidden_size
    return queries + latent + keys_and_values + output


def latent_projections(config: ModelConfig) -> int:
    """Weights of one layer's two projections into the latents: no head has a part in them."""
    c = config
    return c.hidden_size * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim)


def gated_mlp(config: ModelConfig, neurons: int) -> int:
    """Weights of a SwiGLU block: gate, up and down (Shazeer, arXiv 2002.05202)."""
    return 3 * config.hidden_size * neurons


def layer_norms(config: ModelConfig, *, sparse: bool) -> int:
    """Weights of one layer's norms: before each block, in both latents, after a MoE block."""
    c = config
    return c.hidden_size * (3 if sparse else 2) + c.q_lora_rank + c.kv_lora_rank


def components(config: ModelConfig) -> list[Component]:
    """Every parameter of ``AXK1ForCausalLM``, once; a tied output head is part of the embedding."""
    c = config
    vocabulary = c.vocabulary * c.hidden_size
    expert = gated_mlp(c, c.expert_intermediate_size)
    attention = c.layers * attention_projections(c)
    dense = c.dense_layers * gated_mlp(c, c.intermediate_size)
    shared = c.moe_layers * c.shared_experts * expert
    router = c.moe_layers * c.hidden_size * c.experts
    norms = (
        c.dense_layers * layer_norms(c, sparse=False)
        + c.moe_layers * layer_norms(c, sparse=True)
        + c.hidden_size
    )
    found = [
        Component("embedding", vocabulary, vocabulary),
        Component("attention", attention, attention),
        Component("dense MLP", dense, dense),
        Component(
            "routed experts",
            c.moe_layers * c.experts * expert,
            c.moe_layers * c.experts_per_token * expert,
        ),
        Component("shared experts", shared, shared),
        Component("router", router, router),
        Component("norms", norms, norms),
    ]
    if not c.tied_embeddings:
        found.append(Component("output head", vocabulary, vocabulary))
    return found


def total_parameters(config: ModelConfig) -> int:
    """All parameters, without multi-token prediction."""
    return sum(part.total for part in components(config))


def active_parameters(config: ModelConfig) -> int:
    """Parameters that take part in computing one token, embedding and output head included."""
    return sum(part.active for part in components(config))


def vocabulary_parameters(config: ModelConfig) -> int:
    """Parameters that grow with the vocabulary: embedding, and output head if it is its own."""
    return config.vocabulary * config.hidden_size * (1 if config.tied_embeddings else 2)


def mtp_layer(config: ModelConfig) -> Component:
    """One multi-token-prediction layer: a MoE layer, two norms, a projection, a norm at its end.

    It shares embedding and output head with the model and is dropped after training.
    Source: DeepSeek-V3, arXiv 2412.19437, section 2.2.
    """
    c = config
    expert = gated_mlp(c, c.expert_intermediate_size)
    always = (
        attention_projections(c)
        + layer_norms(c, sparse=True)
        + c.shared_experts * expert
        + c.hidden_size * c.experts
        + 3 * c.hidden_size
        + 2 * c.hidden_size * c.hidden_size
    )
    return Component(
        "multi-token prediction",
        always + c.experts * expert,
        always + c.experts_per_token * expert,
    )


def kv_cache_bytes(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that a token adds to the cache: one latent and one rotary key a layer.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.4 and table 1.
    """
    return (config.kv_lora_rank + config.qk_rope_head_dim) * config.layers * bytes_per_value
