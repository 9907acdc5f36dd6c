"""The routed experts' products on the CPU: grouped by expert, by oneDNN.

``transformers`` computes experts by ``grouped_mm``, which on GPUs is one kernel and on CPUs a loop
of products, in float32 by MKL (see :mod:`seodang.training.products` for why that is slow). This is
the same loop by oneDNN, with the elementwise work done while its rows are in the cache. In bfloat16
a product of that size is done before it is well begun, so that ``TOGETHER`` experts with about as
many rows share one, padded to those of the busiest.

oneDNN compiles a kernel for every shape it meets: rows are padded to a multiple of ``ROWS``, so
that few shapes occur. That pays where an expert has many rows: below ``LEAST_ROWS`` of them, as
when a token is generated at a time, and elsewhere than on the CPU, ``grouped_mm`` computes.
``python benchmarks/experts.py`` compares the two.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, silu

from seodang.training.products import linear

EXPERTS = "seodang_grouped"
ROWS = 32
LEAST_ROWS = {torch.float32: 128, torch.bfloat16: 16}  # of an expert, on average
TOGETHER = 8  # more gain nothing, and leave the cache

Stack = torch.Tensor | list[torch.Tensor]
"""A matrix for each expert of a group."""


def use_grouped_experts(model: torch.nn.Module) -> None:
    """Let ``model`` (of ``transformers``) compute its routed experts by :func:`grouped_experts`.

    Experts of another kind than SwiGLU without biases stay as they are.
    """
    experts = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    if not experts or not all(_is_swiglu(module) for module in experts):
        return
    from transformers.integrations.moe import ExpertsInterface

    whole: Any = model
    ExpertsInterface.register(EXPERTS, grouped_experts)
    whole.set_experts_implementation(EXPERTS)


def _is_swiglu(experts: Any) -> bool:
    from transformers.activations import ACT2FN

    other = ("has_bias", "is_transposed", "has_post_expert_norm")
    return (
        experts.has_gate
        and experts._apply_gate.__name__ == "_default_apply_gate"
        and not any(getattr(experts, key, False) for key in other)
        and isinstance(experts.act_fn, (torch.nn.SiLU, type(ACT2FN["silu"])))
    )


def grouped_experts(
    experts: Any, hidden_TH: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, (T, H), as ``transformers`` calls it."""
    dtype = hidden_TH.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    least = LEAST_ROWS.get(dtype, math.inf) * len(experts.down_proj)
    if hidden_TH.device.type != "cpu" or chosen_TK.numel() < least:
        from transformers.integrations.moe import grouped_mm_experts_forward

        found: torch.Tensor = grouped_mm_experts_forward(experts, hidden_TH, chosen_TK, weights_TK)
        return found
    weights = experts.gate_up_proj, experts.down_proj
    with torch.autocast("cpu", enabled=False):
        found = _Experts.apply(  # type: ignore[no-untyped-call]
            hidden_TH.to(dtype), *weights, chosen_TK, weights_TK.float()
        )
    return found.to(hidden_TH.dtype)


class _Experts(torch.autograd.Function):
    """SwiGLU experts; S are the pairs of token and expert, by group and expert, padded.

    G are the experts of a group, R the rows of each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        gate_up_EFH: torch.Tensor,
        down_EHI: torch.Tensor,
        chosen_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        groups, pair_S, slot_TK = _group(chosen_TK, len(down_EHI))
        # Padding stands for the first pair, with weight 0: it adds nothing.
        real_S = pair_S.clamp(min=0)
        token_S = real_S // chosen_TK.shape[1]
        weight_S = weights_TK.reshape(-1)[real_S].masked_fill_(pair_S < 0, 0.0)
        weight_S1 = weight_S[:, None]
        x_SH = x_TH.index_select(0, token_S)
        gate_up_SF = x_SH.new_empty(len(token_S), gate_up_EFH.shape[1])
        y_SH = torch.empty_like(x_SH)
        weights = []
        for group in groups:
            w1, w2 = group.weights(gate_up_EFH, x_SH.dtype), group.weights(down_EHI, x_SH.dtype)
            x, gate_up, y, weight = map(group.rows, (x_SH, gate_up_SF, y_SH, weight_S1))
            _products(x, w1, out=gate_up)
            gate, up = gate_up.chunk(2, 2)
            _products(silu(gate).mul_(up).mul_(weight), w2, out=y)
            weights.append((w1, w2))
        ctx.save_for_backward(x_SH, gate_up_SF, gate_up_EFH, down_EHI, weight_S1, token_S, slot_TK)
        ctx.groups, ctx.weights = groups, weights
        return embedding_bag(slot_TK, y_SH, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_SH, gate_up_SF, gate_up_EFH, down_EHI, weight_S1, token_S, slot_TK = ctx.saved_tensors
        grad_SH = grad_TH.index_select(0, token_S)
        grad_x_SH, grad_weight_S1 = torch.empty_like(x_SH), torch.empty_like(weight_S1)
        wants_gate_up, wants_down = ctx.needs_input_grad[1:3]
        every = sum(len(group.members) for group in ctx.groups) == len(down_EHI)
        new = torch.empty_like if every else torch.zeros_like
        grad_gate_up_EFH = new(gate_up_EFH) if wants_gate_up else None
        grad_down_EHI = new(down_EHI) if wants_down else None
        tensors = (x_SH, gate_up_SF, grad_SH, weight_S1, grad_x_SH, grad_weight_S1)
        for group, (w1, w2) in zip(ctx.groups, ctx.weights, strict=True):
            x, gate_up, grad, weight, grad_x, grad_weight = map(group.rows, tensors)
            gate, up = gate_up.chunk(2, 2)
            active = silu(gate)
            hidden = active * up
            grad_hidden = _products(grad, _transposed(w2))
            torch.sum(grad_hidden * hidden, 2, keepdim=True, dtype=torch.float32, out=grad_weight)
            if grad_down_EHI is not None:
                group.put(grad_down_EHI, _products(grad.mT, hidden.mul_(weight).mT))
            grad_hidden.mul_(weight)
            grad_gate_up = torch.empty_like(gate_up)
            grad_gate, grad_up = grad_gate_up.chunk(2, 2)
            torch.mul(grad_hidden, active, out=grad_up)
            grad_gate.copy_(torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate))
            if grad_gate_up_EFH is not None:
                group.put(grad_gate_up_EFH, _products(grad_gate_up.mT, x.mT))
            _products(grad_gate_up, _transposed(w1), out=grad_x)
        grad_x_TH = embedding_bag(slot_TK, grad_x_SH, mode="sum")
        grad_weights_TK = grad_weight_S1[slot_TK, 0]
        return grad_x_TH, grad_gate_up_EFH, grad_down_EHI, None, grad_weights_TK


class _Group(NamedTuple):
    """Experts with about as many rows: all are padded to those of the busiest."""

    members: list[int]
    begin: int
    end: int

    def rows(self, tensor_SX: torch.Tensor) -> torch.Tensor:
        """This group's part, (G, R, X), without a copy."""
        shape = (len(self.members), -1, tensor_SX.shape[1])
        return tensor_SX[self.begin : self.end].view(shape)

    def weights(self, weight_ENK: torch.Tensor, dtype: torch.dtype) -> Stack:
        """This group's weights: views in float32, else a tensor (G, N, K)."""
        if weight_ENK.dtype == torch.float32 == dtype:
            return [weight_ENK[member] for member in self.members]
        shape = (len(self.members), *weight_ENK.shape[1:])
        found_GNK = weight_ENK.new_empty(shape, dtype=dtype)
        for member, found_NK in zip(self.members, found_GNK, strict=True):
            found_NK.copy_(weight_ENK[member])
        return found_GNK

    def put(self, grad_ENK: torch.Tensor, found_GNK: torch.Tensor) -> None:
        """Write what was found for this group's experts."""
        for member, found_NK in zip(self.members, found_GNK, strict=True):
            grad_ENK[member].copy_(found_NK)


def _transposed(weights_GNK: Stack) -> Stack:
    if isinstance(weights_GNK, torch.Tensor):
        return weights_GNK.mT
    return [weight_NK.T for weight_NK in weights_GNK]


def _products(
    left_GMK: torch.Tensor, right_GNK: Stack, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Left by right transposed for every expert, (G, M, N)."""
    if left_GMK.dtype == torch.float32:
        products = [linear(x, w) for x, w in zip(left_GMK, right_GNK, strict=True)]
        return torch.stack(products, out=out)
    assert isinstance(right_GNK, torch.Tensor)
    return torch.bmm(left_GMK, right_GNK.mT, out=out)


def _group(
    chosen_TK: torch.Tensor, experts: int
) -> tuple[list[_Group], torch.Tensor, torch.Tensor]:
    """Groups of experts that have tokens; the pair of each row (-1: padding) and back."""
    pairs = chosen_TK.reshape(-1)
    # NumPy sorts 16-bit numbers by radix, twenty times as fast as torch sorts these.
    order = torch.from_numpy(np.argsort(pairs.numpy().astype(np.uint16), kind="stable"))
    counts_E = torch.bincount(pairs, minlength=experts)
    busiest_E = counts_E.argsort(descending=True, stable=True)[: int((counts_E > 0).sum())]
    groups: list[_Group] = []
    begin_E = torch.zeros_like(counts_E)
    end = 0
    for members_G in busiest_E.split(TOGETHER):
        rows = -(-int(counts_E[members_G[0]]) // ROWS) * ROWS
        begin_E[members_G] = end + rows * torch.arange(len(members_G))
        groups.append(_Group(members_G.tolist(), end, end + rows * len(members_G)))
        end = groups[-1].end
    # How far the rows of an expert are moved: it starts elsewhere than among the sorted pairs.
    moved_E = begin_E - (counts_E.cumsum(0) - counts_E)
    row_P = torch.arange(len(order)) + moved_E[pairs[order]]
    pair_S = torch.full((end,), -1)
    pair_S[row_P] = order
    slot_P = torch.empty_like(row_P)
    slot_P[order] = row_P
    return groups, pair_S, slot_P.view_as(chosen_TK)
