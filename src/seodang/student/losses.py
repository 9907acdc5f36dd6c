"""The distillation loss on sparse soft labels, without the full matrix of logits.

The loss of position i with entries (id, w) is -sum(w log q_id), q the student's softmax. Its
gradient per logit is q * sum(w) - w, so that loss and gradients need three matrix products per
chunk of rows (logits, gradient of hidden, gradient of head) and no second forward pass: they are
computed together in the forward call, as Liger-Kernel does for cross-entropy (arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20  # of one chunk of float32 logits
IGNORE = -100  # a cross-entropy target that does not count
ROUNDING = 1e-6  # a rest smaller than this is what float32 leaves of a full sum


class LossTerms(NamedTuple):
    """``total`` is differentiable; the two terms, reduced alike, are for looking at."""

    total: torch.Tensor
    distillation: torch.Tensor
    cross_entropy: torch.Tensor


def sparse_kd_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    offsets: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    cross_entropy_targets: torch.Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
) -> torch.Tensor:
    """Soft-label loss -sum(w log q), plus ``cross_entropy_weight`` times the cross-entropy.

    Args:
        hidden: (N, H) the student's last hidden states.
        head: (V, H) output embedding.
        offsets: (N+1,) int64; the entries of position i are [offsets[i], offsets[i+1]).
        ids: (nnz,) token ids; an id may be repeated within a position, its weights then add up
            (not with ``residual``).
        weights: (nnz,) need not sum to 1.
        cross_entropy_targets: (N,) observed next tokens; -100 where there is none.
        cross_entropy_weight: factor of the cross-entropy term.
        bias: (V,) output bias.
        residual: add the bucket of all other ids, -(1-P) log(1-Q) with P = sum(w) and Q the
            student's mass on the stored ids: the divergence of the `residual` estimator.
        reduction: "mean" over the N positions, or "sum".

    Returns:
        A float32 scalar in nats, differentiable in ``hidden``, ``head`` and ``bias``.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    return sparse_kd_terms(
        hidden,
        head,
        offsets,
        ids,
        weights,
        cross_entropy_targets=cross_entropy_targets,
        cross_entropy_weight=cross_entropy_weight,
        bias=bias,
        residual=residual,
        reduction=reduction,
    ).total


def sparse_kd_terms(
    hidden: torch.Tensor,
    head: torch.Tensor,
    offsets: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    cross_entropy_targets: torch.Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
) -> LossTerms:
    """As :func:`sparse_kd_loss`, with the value of each term beside the total."""
    n = hidden.shape[0]
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and head {tuple(head.shape)} do not fit")
    if offsets.shape != (n + 1,):
        raise ValueError(f"offsets {tuple(offsets.shape)} for {n} positions: need ({n + 1},)")
    if ids.shape != weights.shape or ids.ndim != 1 or int(offsets[-1]) != len(ids):
        raise ValueError(
            f"{int(offsets[-1])} entries by offsets, ids {tuple(ids.shape)}, "
            f"weights {tuple(weights.shape)}"
        )
    if cross_entropy_targets is not None and cross_entropy_targets.shape != (n,):
        raise ValueError(f"targets {tuple(cross_entropy_targets.shape)} for {n} positions")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}: use 'mean' or 'sum'")
    scale = 1.0 / max(1, n) if reduction == "mean" else 1.0
    total, distillation, cross_entropy = _SparseKD.apply(  # type: ignore[no-untyped-call]
        hidden,
        head,
        bias,
        offsets,
        ids.long(),
        weights.float(),
        cross_entropy_targets,
        cross_entropy_weight,
        residual,
        scale,
    )
    return LossTerms(total, distillation, cross_entropy)


class _SparseKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        head_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        offsets: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        targets_N: torch.Tensor | None,
        ce_weight: float,
        residual: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n, v = hidden_NH.shape[0], head_VH.shape[0]
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden_NH) if wants_hidden else None
        # Sums over rows are kept in float32 whatever the weights' type.
        grad_head = torch.zeros_like(head_VH, dtype=torch.float32) if wants_head else None
        grad_bias = (
            torch.zeros_like(bias_V, dtype=torch.float32)
            if bias_V is not None and wants_bias
            else None
        )
        distillation = hidden_NH.new_zeros((), dtype=torch.float64)
        cross_entropy = hidden_NH.new_zeros((), dtype=torch.float64)
        step = max(1, CHUNK_BYTES // (4 * v))
        bounds = offsets.tolist()
        for start in range(0, n, step):
            stop = min(start + step, n)
            part = slice(bounds[start], bounds[stop])
            chunk_NH = hidden_NH[start:stop]
            logits_NV = torch.nn.functional.linear(chunk_NH, head_VH, bias_V).float()
            rows = torch.repeat_interleave(
                torch.arange(stop - start, device=ids.device),
                offsets[start + 1 : stop + 1] - offsets[start:stop],
            )
            sums_N = torch.zeros(stop - start, dtype=torch.float64, device=weights.device)
            mass_N = sums_N.index_add_(0, rows, weights[part].double()).float()
            labelled = logits_NV[rows, ids[part]]
            lse_N = torch.logsumexp(logits_NV, dim=-1)
            distillation += (mass_N * lse_N).double().sum() - (weights[part] * labelled).sum()
            # Each softmax entry is multiplied by a factor: one on stored ids, one off them.
            on_N = off_N = mass_N
            if residual:
                others_NV = logits_NV.index_put((rows, ids[part]), logits_NV.new_tensor(-torch.inf))
                log_rest_N = torch.logsumexp(others_NV, dim=-1) - lse_N  # log(1 - Q)
                del others_NV
                has_rest_N = (1.0 - sums_N > ROUNDING) & log_rest_N.isfinite()
                rest_N = torch.where(has_rest_N, 1.0 - sums_N, 0.0).float()
                distillation -= torch.where(has_rest_N, rest_N * log_rest_N, 0.0).double().sum()
                on_N = torch.ones_like(mass_N)
                off_N = 1.0 - torch.where(has_rest_N, rest_N * torch.exp(-log_rest_N), 0.0)
            if targets_N is not None:
                targets = targets_N[start:stop]
                counted_N = targets != IGNORE
                observed_N1 = targets.clamp(min=0)[:, None]
                nll_N = lse_N - logits_NV.gather(1, observed_N1)[:, 0]
                cross_entropy += torch.where(counted_N, nll_N, 0.0).double().sum()
                ce_factor_N = ce_weight * counted_N
                on_N, off_N = on_N + ce_factor_N, off_N + ce_factor_N
            if not (wants_hidden or wants_head or wants_bias):
                continue
            grad_NV = logits_NV.sub_(lse_N[:, None]).exp_()  # the softmax, in place
            if residual:
                on_ids = grad_NV[rows, ids[part]] * on_N[rows]
                grad_NV *= off_N[:, None]
                grad_NV.index_put_((rows, ids[part]), on_ids)
            else:
                grad_NV *= on_N[:, None]
            grad_NV.index_put_((rows, ids[part]), -weights[part], accumulate=True)
            if targets_N is not None:
                grad_NV.scatter_add_(1, observed_N1, -ce_factor_N[:, None])
            grad_NV *= scale
            grad_NV = grad_NV.to(hidden_NH.dtype)
            if grad_hidden is not None:
                torch.mm(grad_NV, head_VH.to(grad_NV.dtype), out=grad_hidden[start:stop])
            if grad_head is not None:
                grad_head.addmm_(grad_NV.T.to(grad_head.dtype), chunk_NH.to(grad_head.dtype))
            if grad_bias is not None:
                grad_bias += grad_NV.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_head, grad_bias)
        ctx.dtypes = head_VH.dtype, None if bias_V is None else bias_V.dtype
        total = distillation + ce_weight * cross_entropy
        shown = [(value * scale).float() for value in (total, distillation, cross_entropy)]
        ctx.mark_non_differentiable(shown[1], shown[2])
        return shown[0], shown[1], shown[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_head, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * upstream
        if grad_head is not None:
            grad_head = (grad_head * upstream).to(ctx.dtypes[0])
        if grad_bias is not None:
            grad_bias = (grad_bias * upstream).to(ctx.dtypes[1])
        return grad_hidden, grad_head, grad_bias, None, None, None, None, None, None, None
