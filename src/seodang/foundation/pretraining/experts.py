"""The routed experts' products on the CPU: grouped by expert, by oneDNN.

``transformers`` computes experts by ``grouped_mm``, which on GPUs is one kernel and on CPUs a loop
of products by MKL (see :mod:`seodang.training.products` for why that is slow). This is the same
loop by oneDNN, with the elementwise work done per expert, while its rows are in the cache. oneDNN
compiles a kernel for every shape it meets: rows are padded to a multiple of ``ROWS``, so that few
shapes occur, or of ``FEW_ROWS`` where there are so few that padding would be most of the work, as
when a token is generated at a time. Elsewhere than on the CPU in float32 it hands over to
``grouped_mm``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, silu

from seodang.training.products import linear

EXPERTS = "seodang_grouped"
ROWS = 32
FEW_ROWS = 8


def use_grouped_experts(model: Any) -> None:
    """Let ``model`` (of ``transformers``) compute its routed experts by :func:`grouped_experts`."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(EXPERTS, grouped_experts)
    model.set_experts_implementation(EXPERTS)


def grouped_experts(
    experts: Any, hidden_TH: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, (T, H), as ``transformers`` calls it."""
    plain = hidden_TH.device.type == "cpu" and hidden_TH.dtype == torch.float32
    if not plain or torch.is_autocast_enabled("cpu"):
        from transformers.integrations.moe import grouped_mm_experts_forward

        found: torch.Tensor = grouped_mm_experts_forward(experts, hidden_TH, chosen_TK, weights_TK)
        return found
    found = _Experts.apply(  # type: ignore[no-untyped-call]
        hidden_TH, experts.gate_up_proj, experts.down_proj, chosen_TK, weights_TK
    )
    return found


class _Experts(torch.autograd.Function):
    """SwiGLU experts; S are the pairs of token and expert, by expert, padded."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        gate_up_EFH: torch.Tensor,
        down_EHI: torch.Tensor,
        chosen_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        counts, pair_S, slot_TK = _group(chosen_TK, len(down_EHI))
        token_S = pair_S.clamp(min=0) // chosen_TK.shape[1]
        x_SH = x_TH.index_select(0, token_S)
        gate_up_SF = x_TH.new_empty(len(token_S), gate_up_EFH.shape[1])
        y_SH = torch.empty_like(x_SH)
        rows = (tensor.split(counts) for tensor in (x_SH, gate_up_SF, y_SH))
        for x, gate_up, y, w1, w2 in zip(*rows, gate_up_EFH, down_EHI, strict=True):
            if len(x):
                gate_up.copy_(linear(x, w1))
                gate, up = gate_up.chunk(2, 1)
                y.copy_(linear(silu(gate).mul_(up), w2))
        ctx.save_for_backward(
            x_SH, gate_up_SF, gate_up_EFH, down_EHI, weights_TK, pair_S, token_S, slot_TK
        )
        ctx.counts = counts
        return embedding_bag(slot_TK, y_SH, per_sample_weights=weights_TK, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        x_SH, gate_up_SF, gate_up_EFH, down_EHI, weights_TK, pair_S, token_S, slot_TK = saved
        grad_SH = grad_TH.index_select(0, token_S)
        # Padding has weight 0: whatever token it stands for, it adds nothing.
        weight_S = weights_TK.reshape(-1)[pair_S.clamp(min=0)].masked_fill_(pair_S < 0, 0.0)
        grad_x_SH, grad_weight_S = torch.empty_like(x_SH), torch.empty_like(weight_S)
        grad_gate_up_EFH, grad_down_EHI = torch.zeros_like(gate_up_EFH), torch.zeros_like(down_EHI)
        up_to_down_EIH = down_EHI.transpose(1, 2)
        down_to_up_EHF = gate_up_EFH.transpose(1, 2)
        tensors = (x_SH, gate_up_SF, grad_SH, weight_S[:, None], grad_weight_S, grad_x_SH)
        rows = (tensor.split(ctx.counts) for tensor in tensors)
        of_experts = (up_to_down_EIH, down_to_up_EHF, grad_gate_up_EFH, grad_down_EHI)
        for x, gate_up, grad, weight, grad_weight, grad_x, w2, w1, grad_w1, grad_w2 in zip(
            *rows, *of_experts, strict=True
        ):
            if not len(x):
                continue
            gate, up = gate_up.chunk(2, 1)
            active = silu(gate)
            hidden = active * up
            grad_hidden = linear(grad, w2)
            torch.linalg.vecdot(grad_hidden, hidden, out=grad_weight)
            grad_w2.copy_(linear(grad.T, hidden.mul_(weight).T))
            grad_hidden.mul_(weight)
            grad_gate_up = torch.empty_like(gate_up)
            grad_gate, grad_up = grad_gate_up.chunk(2, 1)
            torch.mul(grad_hidden, active, out=grad_up)
            grad_gate.copy_(torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate))
            grad_w1.copy_(linear(grad_gate_up.T, x.T))
            grad_x.copy_(linear(grad_gate_up, w1))
        grad_x_TH = embedding_bag(slot_TK, grad_x_SH, mode="sum")
        return grad_x_TH, grad_gate_up_EFH, grad_down_EHI, None, grad_weight_S[slot_TK]


def _group(chosen_TK: torch.Tensor, experts: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Rows of every expert, padded; the pair of each row (-1: padding) and back."""
    pairs, order = chosen_TK.reshape(-1).sort(stable=True)
    counts_E = torch.bincount(pairs, minlength=experts)
    rows = ROWS if len(pairs) >= ROWS * experts else FEW_ROWS
    padded_E = (counts_E + rows - 1) // rows * rows
    # How far the rows of an expert are moved by the padding of those before it.
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    row_P = torch.arange(len(order)) + shift_E[pairs]
    pair_S = torch.full((int(padded_E.sum()),), -1)
    pair_S[row_P] = order
    slot_P = torch.empty_like(row_P)
    slot_P[order] = row_P
    return padded_E.tolist(), pair_S, slot_P.view_as(chosen_TK)
