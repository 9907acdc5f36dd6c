"""The shape of an A.X K1 model: dimensions checked against the rules that they must obey.

The design is DeepSeek-V3's (arXiv 2412.19437) with a norm on every MoE block's output (arXiv
2601.09200); rules that come from how ``transformers`` computes it say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from seodang.errors import InputError
from seodang.foundation.presets import PRESETS
from seodang.recipe import Section

if TYPE_CHECKING:
    from transformers import AXK1Config


class ModelConfig(Section):
    """A shape: a ``preset``, every dimension, or a preset with some dimensions changed."""

    preset: str | None = Field(None, description=f"one of {', '.join(PRESETS)}")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    layers: int = Field(gt=0, description="decoder layers")
    dense_layers: int = Field(ge=0, description="first layers, whose MLP is dense")
    heads: int = Field(gt=0, description="attention heads")
    q_lora_rank: int = Field(gt=0, description="width of the queries' latent")
    kv_lora_rank: int = Field(gt=0, description="width of the keys' and values' latent")
    qk_nope_head_dim: int = Field(gt=0, description="of a head, without rotary embedding")
    qk_rope_head_dim: int = Field(gt=0, description="of a head, with rotary embedding")
    v_head_dim: int = Field(gt=0, description="values of a head")
    intermediate_size: int = Field(gt=0, description="neurons of a dense MLP")
    expert_intermediate_size: int = Field(gt=0, description="neurons of an expert")
    experts: int = Field(gt=0, description="routed experts of a layer")
    shared_experts: int = Field(gt=0, description="experts that see every token")
    experts_per_token: int = Field(gt=0, description="routed experts that see a token")
    groups: int = Field(gt=0, description="groups that the routed experts are in")
    groups_per_token: int = Field(gt=0, description="groups a token's experts may come from")
    vocabulary: int = Field(gt=0, description="rows of the embedding; the tokenizer's fit in")
    context: int = Field(gt=0, description="positions, YaRN included")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary embedding")
    yarn_factor: float = Field(
        1.0, ge=1, description="by which YaRN stretches the context that was trained"
    )
    mtp_layers: int = Field(
        0, ge=0, description="layers that predict one token further; only in training"
    )
    tied_embeddings: bool = Field(False, description="the output head is the embedding")

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("preset"), str):
            return given
        if given["preset"] not in PRESETS:
            raise ValueError(f"no preset {given['preset']!r}: there are {', '.join(PRESETS)}")
        return {**PRESETS[given["preset"]], **given}

    @model_validator(mode="after")
    def _obeys_the_rules(self) -> Self:
        broken = broken_rules(self)
        if broken:
            raise ValueError("; ".join(broken))
        return self

    @property
    def is_published(self) -> bool:
        """Whether this is the released model, nothing changed."""
        return self == ModelConfig.model_validate({"preset": "a.x-k1"})

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts, the multi-token-prediction layers not among them."""
        return self.layers - self.dense_layers

    @property
    def trained_context(self) -> int:
        """Positions before YaRN stretches them."""
        return round(self.context / self.yarn_factor)


def broken_rules(config: ModelConfig) -> list[str]:
    """The rules that the dimensions break, each with the numbers that break it."""
    c = config
    per_group, left_over = divmod(c.experts, c.groups)
    eligible = c.groups_per_token * per_group
    q_width = c.heads * c.qk_head_dim
    kv_width = c.heads * (c.qk_nope_head_dim + c.v_head_dim)
    rules = [
        (
            c.dense_layers <= c.layers,
            f"dense_layers ({c.dense_layers}) are some of the layers ({c.layers}): at most as many",
        ),
        (
            not left_over,
            f"groups are of equal size: experts ({c.experts}) must be a multiple of "
            f"groups ({c.groups})",
        ),
        (
            per_group >= 2,
            "a group is scored by its two best experts, so that it needs two: "
            f"experts / groups is {c.experts} / {c.groups}",
        ),
        (
            c.groups_per_token <= c.groups,
            f"groups_per_token ({c.groups_per_token}) cannot be more than groups ({c.groups})",
        ),
        (
            c.experts_per_token <= eligible,
            f"experts_per_token ({c.experts_per_token}) cannot be more than the experts of the "
            f"groups that a token may use: groups_per_token x experts / groups is "
            f"{c.groups_per_token} x {c.experts} / {c.groups} = {eligible}",
        ),
        (
            c.qk_rope_head_dim % 2 == 0,
            "rotary embedding turns pairs of dimensions: qk_rope_head_dim "
            f"({c.qk_rope_head_dim}) must be even",
        ),
        (
            c.q_lora_rank <= min(c.hidden_size, q_width),
            f"q_lora_rank ({c.q_lora_rank}) cannot be more than what it stands between: "
            f"hidden_size ({c.hidden_size}) and heads x (qk_nope + qk_rope) ({q_width})",
        ),
        (
            c.kv_lora_rank <= min(c.hidden_size, kv_width),
            f"kv_lora_rank ({c.kv_lora_rank}) cannot be more than what it stands between: "
            f"hidden_size ({c.hidden_size}) and heads x (qk_nope + v) ({kv_width})",
        ),
        (
            c.trained_context * c.yarn_factor == c.context,
            f"context ({c.context}) must be yarn_factor ({c.yarn_factor:g}) times a whole number "
            "of positions",
        ),
    ]
    return [rule for holds, rule in rules if not holds]


def hf_config(config: ModelConfig, vocabulary: int) -> AXK1Config:
    """The configuration of ``transformers``' ``AXK1ForCausalLM``.

    ``vocabulary`` is the size of the tokenizer (``len(tokenizer)``), the embedding has
    ``config.vocabulary`` rows. Special tokens are None: set them from the tokenizer. The
    multi-token-prediction layers are no part of that class. Raises ``InputError`` if the
    tokenizer has ids beyond the embedding.
    """
    from transformers import AXK1Config

    if vocabulary > config.vocabulary:
        raise InputError(
            f"the tokenizer has {vocabulary:,} tokens, the model's vocabulary only "
            f"{config.vocabulary:,}: set `model.vocabulary` to {vocabulary} or more"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn_factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": config.yarn_factor,
            "original_max_position_embeddings": config.trained_context,
        }
    # Newer versions only list each layer's kind, but go on reading this.
    dense: dict[str, Any] = {"first_k_dense_replace": config.dense_layers}
    return AXK1Config(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.expert_intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        n_shared_experts=config.shared_experts,
        n_routed_experts=config.experts,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        n_group=config.groups,
        topk_group=config.groups_per_token,
        num_experts_per_tok=config.experts_per_token,
        max_position_embeddings=config.context,
        rope_parameters=rope,
        tie_word_embeddings=config.tied_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **dense,
    )
