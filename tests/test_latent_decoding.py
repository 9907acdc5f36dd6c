"""Latent attention on its cache: what `transformers` says after expanding it, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AXK1Config, AXK1ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from seodang.causal_lm import CausalLM, left_padded
from seodang.training.latent_decoding import use_latent_decoding
from tiny_think import tiny_base

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4,
    "v_head_dim": 9,
    "intermediate_size": 20,
    "mlp_layer_types": ["dense", "dense"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def a_x_k1() -> Any:
    return AXK1ForCausalLM(AXK1Config(**SHAPE, q_lora_rank=6))


def deepseek(low_rank_queries: int | None) -> Any:
    config = DeepseekV3Config(**SHAPE, q_lora_rank=low_rank_queries, rope_interleave=True)
    return DeepseekV3ForCausalLM(config)


MODELS = {"A.X K1": a_x_k1, "DeepSeek-V3": lambda: deepseek(6), "whole": lambda: deepseek(None)}


def spoken(model: Any, prompts: list[list[int]], attention: str) -> torch.Tensor:
    """The logits of every one of five new tokens, (5, prompts, vocabulary)."""
    model.set_attn_implementation(attention)
    ids, mask = left_padded([np.array(prompt, np.int32) for prompt in prompts])
    with torch.no_grad():
        said = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(said.logits)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 2**20))
def test_says_what_the_expanded_cache_says(
    kind: str, attention: str, lengths: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    prompts = [torch.randint(1, 50, (length,)).tolist() for length in lengths]
    expected = spoken(model, prompts, attention)
    use_latent_decoding(model)
    torch.testing.assert_close(spoken(model, prompts, attention), expected)


def test_every_model_that_is_loaded_expands_its_cache_once(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CausalLM.load(tiny_base(tmp_path).path)
    lengths: list[int] = []
    layers = model.body.layers
    for layer in layers:
        expand = layer.self_attn.expand_kv
        monkeypatch.setattr(
            layer.self_attn,
            "expand_kv",
            lambda latent, place, expand=expand: (
                lengths.append(latent.shape[2]) or expand(latent, place)
            ),
        )
    prompt = np.arange(7, dtype=np.int32)
    said = model.generate([prompt], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert said.shape == (1, 6)
    assert lengths == [len(prompt)] * len(layers)
