"""Float32 products on the CPU through oneDNN, where PyTorch would send them to MKL.

MKL does not use AVX-512 on processors that are not Intel's: on an AMD EPYC (Zen 5) the products of
training take 2.2 times as long by it. oneDNN comes with PyTorch, but `torch.nn.functional.linear`
does not use it for float32. A product of few rows, such as the next token of a few answers, goes by
MKL all the same: for narrow weights that is faster there too (``python benchmarks/products.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

FEW_ROWS = 16  # from so many on oneDNN is faster for all but the narrowest weights


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear`` without a gradient: (..., K) by (N, K) gives (..., N)."""
    if _by_onednn(x) and weight.dtype == torch.float32:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return torch.nn.functional.linear(x, weight, bias)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`linear`, with a gradient."""
    if not takes_fast_products(x):
        return torch.nn.functional.linear(x, weight, bias)
    found: torch.Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


def use_fast_products(model: torch.nn.Module) -> None:
    """Let the linear layers of ``model`` compute by :func:`product`, in place."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = _Linear


def takes_fast_products(x: torch.Tensor) -> bool:
    """Whether layers with this input compute by oneDNN."""
    return _by_onednn(x) and not torch.is_autocast_enabled("cpu")


def _by_onednn(x: torch.Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return False
    if x.numel() < FEW_ROWS * x.shape[-1]:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


class _Linear(torch.nn.Linear):
    """``torch.nn.Linear``, whose three products go through oneDNN where that is faster."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return product(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight_NK)
        return linear(x, weight_NK, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_NK = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_MN = grad.reshape(-1, grad.shape[-1])
        grad_x = linear(grad_MN, weight_NK.T).view_as(x) if wants_x else None
        grad_weight = linear(grad_MN.T, x.reshape(-1, x.shape[-1]).T) if wants_weight else None
        return grad_x, grad_weight, grad_MN.sum(0) if wants_bias else None
