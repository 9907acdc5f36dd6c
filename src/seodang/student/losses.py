"""The distillation loss on sparse soft labels, without the full matrix of logits.

The loss of position i with entries (id, w) is -sum(w log q_id), q the student's softmax; with
``residual`` the other ids count as one more category. How both, and their gradients, are computed
at the cost of three matrix products is told in :mod:`seodang.student.one_pass`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from seodang.student import one_pass, triton_kd
from seodang.student.one_pass import IGNORE, Divergence, Gradients, LabelledRows, Labels

ROUNDING = 1e-6  # a rest smaller than this is what float32 leaves of a full sum


class LossTerms(NamedTuple):
    """``total`` is differentiable; the two terms, reduced alike, are for looking at."""

    total: torch.Tensor
    kd_loss: torch.Tensor
    cross_entropy: torch.Tensor


def _cross_entropy(labels: LabelledRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value_R = labels.sum(-labels.weights * labels.log_q)
    return value_R, -labels.weights, torch.zeros_like(value_R)


def _residual(labels: LabelledRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value_R, a_E, _ = _cross_entropy(labels)
    rest_R = 1.0 - labels.sum(labels.weights)
    rest_R = torch.where((rest_R > ROUNDING) & labels.log_rest.isfinite(), rest_R, 0.0)
    value_R -= torch.where(rest_R > 0, rest_R * labels.log_rest, 0.0)
    return value_R, a_E, -rest_R


CROSS_ENTROPY = Divergence("cross-entropy", False, _cross_entropy)
RESIDUAL = Divergence("residual", True, _residual)


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
        hidden: (N, H) the student's last hidden states. Their type is that of the products:
            float32, float64 or bfloat16 (float16 on the CPU is computed in float32); sums over
            the vocabulary and over rows are kept in float32 or better.
        head: (V, H) output embedding, of the same or another floating type.
        offsets: (N+1,) int64; the entries of position i are [offsets[i], offsets[i+1]). A
            position without entries and without an observed token costs nothing.
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
        A float32 scalar in nats (float64 for float64 hidden states), differentiable once in
        ``hidden``, ``head`` and ``bias``.

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
    scale: float = 1.0,
    head_gradient: torch.Tensor | None = None,
) -> LossTerms:
    """As :func:`sparse_kd_loss`, with the value of each term beside the total, for training.

    All terms are multiplied by ``scale``: known before the pass, it costs no further one over the
    gradients. The gradient of ``head`` is added to ``head_gradient`` (V, H) by this very call if it
    is given (float32, or float64 for float64 hidden states), and is then not autograd's business;
    so no second tensor of that size is needed to accumulate gradients.
    """
    return divergence_terms(
        RESIDUAL if residual else CROSS_ENTROPY,
        hidden,
        head,
        offsets,
        ids,
        weights,
        cross_entropy_targets=cross_entropy_targets,
        cross_entropy_weight=cross_entropy_weight,
        bias=bias,
        reduction=reduction,
        scale=scale,
        head_gradient=head_gradient,
    )


def divergence_terms(
    divergence: Divergence,
    hidden: torch.Tensor,
    head: torch.Tensor,
    offsets: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    cross_entropy_targets: torch.Tensor | None,
    cross_entropy_weight: float,
    bias: torch.Tensor | None,
    reduction: Literal["mean", "sum"],
    scale: float,
    head_gradient: torch.Tensor | None,
) -> LossTerms:
    """Any :class:`Divergence`; the arguments are those of :func:`sparse_kd_terms`."""
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
    targets = cross_entropy_targets
    if targets is not None and targets.shape != (n,):
        raise ValueError(f"targets {tuple(targets.shape)} for {n} positions")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}: use 'mean' or 'sum'")
    if reduction == "mean":
        scale /= max(1, n)

    counts_N = offsets.diff() > 0
    if targets is not None:
        counts_N = counts_N | (targets != IGNORE)
    rows = counts_N.nonzero()[:, 0]
    if len(rows) < n:  # the others have no entries: what is left of offsets still fits ids
        hidden = hidden.index_select(0, rows)
        offsets = torch.cat([offsets[:1], offsets[1:].index_select(0, rows)])
        targets = targets if targets is None else targets.index_select(0, rows)
    total, distillation, cross_entropy = _OnePass.apply(  # type: ignore[no-untyped-call]
        hidden,
        head if head_gradient is None else head.detach(),
        bias,
        head_gradient,
        divergence,
        Labels(offsets, ids.long(), weights, targets, cross_entropy_weight),
        scale,
    )
    return LossTerms(total, distillation, cross_entropy)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        head_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        head_gradient_VH: torch.Tensor | None,
        divergence: Divergence,
        labels: Labels,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        # Sums over rows are kept in float32 whatever the weights' type.
        sums = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        gradients = Gradients(
            torch.empty_like(hidden_NH, memory_format=torch.contiguous_format)
            if wants_hidden
            else None,
            torch.zeros_like(head_VH, dtype=sums, memory_format=torch.contiguous_format)
            if wants_head
            else head_gradient_VH,
            torch.zeros_like(bias_V, dtype=sums) if bias_V is not None and wants_bias else None,
        )
        with torch.autocast(hidden_NH.device.type, enabled=False):
            on_gpu = triton_kd.fits(hidden_NH, labels.ids)
            distillation, cross_entropy = (triton_kd if on_gpu else one_pass).run(
                divergence, hidden_NH, head_VH, bias_V, labels, scale, gradients
            )
        ctx.gradients = gradients if wants_head else gradients._replace(head=None)
        ctx.dtypes = (
            hidden_NH.dtype,
            head_VH.dtype,
            None if bias_V is None else bias_V.dtype,
        )
        total = distillation + labels.cross_entropy_weight * cross_entropy
        shown = [(value * scale).to(sums) for value in (total, distillation, cross_entropy)]
        ctx.mark_non_differentiable(shown[1], shown[2])
        return shown[0], shown[1], shown[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss was gone through backward already: compute it again")
        found, ctx.gradients = ctx.gradients, None
        # On a GPU asking for the value would wait for it, which costs more than the products.
        if upstream.is_cuda or upstream != 1:
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(upstream)
        return *(
            gradient if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(found, ctx.dtypes, strict=True)
        ), *[None] * 4
