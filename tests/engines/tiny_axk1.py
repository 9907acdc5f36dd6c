"""A tiny random model of the A.X K1 architecture, saved so that vLLM loads it too."""

from __future__ import annotations

from pathlib import Path

from seodang.foundation.vllm_checkpoint import add_what_vllm_reads
from tiny import tiny_tokenizer


def tiny_axk1(path: Path) -> Path:
    """Save an AXK1 with random weights (fp32) and the tests' tokenizer into ``path``.

    vLLM's CPU kernel of latent attention needs kv_lora_rank + qk_rope_head_dim = 576.
    """
    import torch
    from transformers import AXK1Config, AXK1ForCausalLM

    tokenizer = tiny_tokenizer()
    config = AXK1Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=512,
        q_lora_rank=64,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=1024,
        # Wider than usual, so that the random teacher's distributions are not almost uniform.
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AXK1ForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)

    add_what_vllm_reads(path, dense_layers=1)
    return path
