"""Tiny models of every family whose width can change: random weights, biases and norms too."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tiny import tiny_tokenizer

COMMON = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-9,  # so that widths differ by float32 alone
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "qwen2": {**COMMON, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {**COMMON, "head_dim": 16},
    "axk1": {
        **COMMON,
        "num_key_value_heads": 6,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "attention_bias": True,
    },
}


SPECIAL = ("bos", "eos", "pad")
_tokenizer = lru_cache(tiny_tokenizer)  # training one takes longer than the tests that use it


def tiny_model(family: str, *, tied: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A model whose every parameter is random, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    shape = {**FAMILIES.get(family, COMMON), "tie_word_embeddings": tied, **special, **changes}
    config = AutoConfig.for_model(family, **{"vocab_size": len(tokenizer), **shape})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, value in model.state_dict().items():
            if value.ndim == 1:  # norms are made as ones, biases as zeros
                value.add_(0.3 * torch.randn_like(value))
            assert value.std() > 0, name
    return model.eval()


def save(model: Any, path: Path) -> Path:
    """Model and tokenizer as a Hugging Face directory."""
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def logits(model: Any, length: int = 40, **options: Any) -> torch.Tensor:
    """Logits of a fixed text of random tokens, (length, vocabulary)."""
    ids = torch.randint(0, 500, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids, **options).logits[0]
