"""A tiny random model of the A.X K1 design with the foundation's tokenizer, as a base to train."""

from __future__ import annotations

from pathlib import Path

from seodang.artifact import MANIFEST, Artifact, Draft, begin
from seodang.causal_lm import copy_tokenizer, load_tokenizer
from seodang.foundation.post_training.config import (
    FineTuningConfig,
    PolicyConfig,
    PostTrainingConfig,
)
from seodang.foundation.post_training.fine_tuning import fine_tune
from seodang.foundation.post_training.policy_optimization import optimize_policy
from seodang.foundation.post_training.problem import MODES
from seodang.foundation.post_training.reasoning_data import make_problems
from seodang.foundation.pretraining.tokens import tokenize_raw
from seodang.foundation.tokenizer.config import TokenizerConfig
from seodang.foundation.tokenizer.train import train_tokenizer
from tiny_raw import tiny_raw

TINY = PostTrainingConfig(
    problems=16,
    overlap_problems=8,
    held_out=6,
    instruct=FineTuningConfig(batch_sequences=4, text_sequences=1),
    reasoning=FineTuningConfig(batch_sequences=4, text_sequences=1),
    overlap=FineTuningConfig(batch_sequences=8, text_sequences=1),
    policy=PolicyConfig(
        rounds=6, instructions=1, answers=4, checkpoint_rounds=2, learning_rate=5e-5
    ),
    max_new_tokens=8,
    checkpoint_steps=3,
)


def tiny_tokenizer_artifact(path: Path) -> Artifact:
    """A tokenizer of 500 entries, trained on generated problems."""
    texts = [f"{p.question}\n{p.thoughts}\n{p.answer}" for p in make_problems(range(200), 5)]
    raw = tiny_raw(path / "raw", [("ko", text) for text in texts])
    config = TokenizerConfig(
        vocabulary=500, mixture={"ko": 1.0}, min_character_count=30, spare_tokens=2
    )
    return train_tokenizer(config, raw, path / "tokenizer")


def tiny_base(path: Path, kv_lora_rank: int = 16, qk_rope_head_dim: int = 8) -> Artifact:
    """Save the model (random weights, fp32) and its tokenizer as a finished artifact."""
    import torch
    from transformers import AXK1Config, AXK1ForCausalLM

    tokenizer = tiny_tokenizer_artifact(path)
    ids = load_tokenizer(tokenizer.path)
    config = AXK1Config(
        vocab_size=len(ids),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=kv_lora_rank,
        q_lora_rank=16,
        qk_rope_head_dim=qk_rope_head_dim,
        qk_nope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=512,
        bos_token_id=ids.bos_token_id,
        eos_token_id=ids.eos_token_id,
        pad_token_id=ids.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AXK1ForCausalLM(config)
    draft = begin(path / "base", "base-model", {"random": True}, {"tokenizer": tokenizer.digest})
    assert isinstance(draft, Draft)
    model.save_pretrained(draft.path)
    copy_tokenizer(tokenizer.path, draft.path)
    return draft.finish()


def tiny_tokens(model: Artifact, folder: Path) -> Artifact:
    """Text to remember, as the tokens of ``model``, in ``folder``."""
    tokens = folder / "tokens"
    if (tokens / MANIFEST).exists():
        return Artifact.open(tokens)
    return tokenize_raw(tiny_raw(folder / "raw"), model, tokens)


def tiny_answering(base: Artifact, data: Artifact, out: Path) -> Artifact:
    """The base, tuned until some of its answers end: what reinforcement learning needs."""
    tuning = FineTuningConfig(batch_sequences=8, text_sequences=0, epochs=15, learning_rate=1e-2)
    tokens = tiny_tokens(base, out.parent)
    return fine_tune(TINY, tuning, base, data, "train", ["instant"], tokens, out)


def tiny_tuning(base: Artifact, data: Artifact, out: Path) -> Artifact:
    """Fine-tuning in both modes: 8 steps."""
    tokens = tiny_tokens(base, out.parent)
    return fine_tune(TINY, TINY.instruct, base, data, "train", MODES, tokens, out)


def tiny_policy(base: Artifact, data: Artifact, out: Path) -> Artifact:
    """Reinforcement learning: 6 rounds."""
    return optimize_policy(TINY, base, data, out)


STAGES = {"tuning": tiny_tuning, "policy": tiny_policy}
