"""Routed experts by oneDNN and together against `transformers`' `grouped_mm`, on this CPU.

    python benchmarks/experts.py [--preset laptop-nano] [--tokens 8192]

A layer's experts, forward and backward, in turns: how many times as long `grouped_mm` takes (above
1, ours are faster). The load is that of routers that are nearly balanced, drawn at random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from seodang.foundation.model_config import ModelConfig, hf_config
from seodang.machine import cpu
from seodang.training.experts import grouped_experts

ROUNDS = 15


def main() -> None:
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.axk1.modeling_axk1 import AXK1Experts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="laptop-nano")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    config = ModelConfig(preset=options.preset)
    torch.manual_seed(0)
    experts = AXK1Experts(hf_config(config, config.vocabulary))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    scores_TE = torch.randn(options.tokens, config.experts) + 0.1 * torch.randn(config.experts)
    weights_TK, chosen_TK = scores_TE.sigmoid().topk(config.experts_per_token)
    load_E = torch.bincount(chosen_TK.flatten(), minlength=config.experts)
    print(f"{cpu().model}, {torch.get_num_threads()} threads; {options.preset}", end="; ")
    print(f"{options.tokens} tokens, busiest expert {load_E.max() / load_E.float().mean():.2f}")
    hidden_TH = torch.randn(options.tokens, config.hidden_size)
    for precision in (torch.bfloat16, torch.float32):
        pairs = [
            [
                seconds(function, precision, experts, hidden_TH, chosen_TK, weights_TK)
                for function in (grouped_mm_experts_forward, grouped_experts)
            ]
            for _ in range(ROUNDS + 2)
        ][2:]
        forward, both = (statistics.median(a[i] / b[i] for a, b in pairs) for i in range(2))
        print(f"{precision}: forward {forward:.2f}, with backward {both:.2f}", flush=True)


def seconds(
    function: Callable[..., torch.Tensor],
    precision: torch.dtype,
    experts: Any,
    hidden_TH: torch.Tensor,
    chosen_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> tuple[float, float]:
    """How long a forward pass takes, and one with its backward pass."""
    hidden_TH = hidden_TH.clone().requires_grad_()
    weights_TK = weights_TK.clone().requires_grad_()
    experts.zero_grad(set_to_none=True)
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, precision == torch.bfloat16):
        found = function(experts, hidden_TH, chosen_TK, weights_TK)
    forward = time.perf_counter() - started
    found.float().sum().backward()
    return forward, time.perf_counter() - started


if __name__ == "__main__":
    main()
