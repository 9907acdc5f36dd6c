"""A tiny A.X K1 and its synthetic corpus, as the stages of a foundation run leave them."""

from __future__ import annotations

from pathlib import Path

from seodang.artifact import Artifact
from seodang.foundation.model_config import ModelConfig
from seodang.foundation.pretraining.config import PretrainingConfig
from seodang.foundation.pretraining.tokens import tokenize_raw
from seodang.foundation.tokenizer.config import TokenizerConfig
from seodang.foundation.tokenizer.train import train_tokenizer
from tiny_raw import tiny_raw

MODEL = ModelConfig(
    hidden_size=32,
    layers=3,
    dense_layers=1,
    heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=64,
    expert_intermediate_size=16,
    experts=8,
    shared_experts=1,
    experts_per_token=2,
    groups=4,
    groups_per_token=2,
    vocabulary=512,
    context=32,
    tied_embeddings=True,
)
CONFIG = PretrainingConfig(
    tokens=12_000, batch_tokens=1024, micro_batch_tokens=512, learning_rate=1e-2
)


def tiny_tokens(folder: Path) -> tuple[Artifact, Artifact]:
    """Tokenizer and tokens in ``folder``, beside their raw corpus."""
    raw = tiny_raw(folder / "raw")
    config = TokenizerConfig(vocabulary=512, spare_tokens=2, min_character_count=1000)
    tokenizer = train_tokenizer(config, raw, folder / "tokenizer")
    return tokenizer, tokenize_raw(raw, tokenizer, folder / "tokens", shard_tokens=4000)
