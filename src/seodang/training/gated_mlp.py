"""The gated MLP of Llama and Qwen, down(silu(gate(x)) * up(x)), with less to keep for its backward.

Autograd keeps four activations of the inner width for each token: gate, silu(gate), up and their
product. The second and the fourth are computed again here, which is two passes over elements
beside three products (Shazeer, arXiv 2002.05202; Liger-Kernel's SwiGLU does so on GPUs).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from seodang.training.products import linear, takes_fast_products

GATED_MLPS = {"LlamaMLP", "Qwen2MLP", "Qwen3MLP", "AXK1MLP"}  # of transformers


def use_lean_mlps(model: torch.nn.Module) -> None:
    """Let the gated MLPs of ``model`` train with half the activations, in place."""
    mlp: Any
    for mlp in model.modules():
        if type(mlp).__name__ in GATED_MLPS and mlp.config.hidden_act == "silu":
            mlp.forward = partial(_forward, mlp, mlp.forward)


def _forward(mlp: Any, usual: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
    if not takes_fast_products(x):
        return usual(x)
    down = mlp.down_proj
    return _GatedProduct.apply(  # type: ignore[no-untyped-call]
        mlp.gate_proj(x), mlp.up_proj(x), down.weight, down.bias
    )


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        weight_HI: torch.Tensor,
        bias_H: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight_HI)
        return linear(silu(gate).mul_(up), weight_HI, bias_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, weight_HI = ctx.saved_tensors
        grad_NH = grad.reshape(-1, grad.shape[-1])
        inner = linear(grad_NH, weight_HI.T).view_as(gate)
        active = silu(gate)
        weight = bias = None
        if ctx.needs_input_grad[2]:
            weight = linear(grad_NH.T, (active * up).view(-1, gate.shape[-1]).T)
        if ctx.needs_input_grad[3]:
            bias = grad_NH.sum(0)
        grad_up = active.mul_(inner)
        grad_gate = torch.ops.aten.silu_backward(inner.mul_(up), gate)
        return grad_gate, grad_up, weight, bias
