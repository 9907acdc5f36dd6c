"""What vLLM 0.32 reads of a checkpoint of the A.X K1 design and ``transformers`` does not write."""

from __future__ import annotations

import json
from pathlib import Path

from seodang.artifact import write_json

_KEYS = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def add_what_vllm_reads(directory: Path, dense_layers: int) -> None:
    """Let vLLM load the model in ``directory``, whose first ``dense_layers`` have no experts.

    ``transformers`` loads it as before.

    vLLM's ``AXK1ForCausalLM`` asks the configuration for the keys by which older code described the
    same routers, and the weights for a norm after the MLP of dense layers too, where none is used.
    It does not tie the output head to the embedding: without a copy its head is random numbers.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file = directory / "config.json"
    config = json.loads(file.read_bytes())
    write_json(file, {**config, **_KEYS, "first_k_dense_replace": dense_layers})
    weights = load_file(directory / "model.safetensors")
    for index in range(dense_layers):
        name = f"model.layers.{index}.post_mlp_layernorm.weight"
        weights[name] = torch.ones(config["hidden_size"])
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
