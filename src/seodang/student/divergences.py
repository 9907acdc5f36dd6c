"""Reverse Kullback-Leibler and Jensen-Shannon divergence on sparse labels, for on-policy training.

Teacher and student are compared on k+1 categories: the k stored ids with the teacher's
probabilities p, and one for all other ids, with 1-P against the student's 1-Q. Both are lower
bounds of the divergences of the full distributions (data processing inequality). Agarwal et al.
2024 (arXiv 2306.13649) train on the student's own text with them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from seodang.student.losses import ROUNDING, LossTerms, divergence_terms
from seodang.student.one_pass import Divergence, LabelledRows


def sparse_divergence_terms(
    hidden: torch.Tensor,
    head: torch.Tensor,
    offsets: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    divergence: Literal["reverse-kl", "jsd"],
    cross_entropy_targets: torch.Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    bias: torch.Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    scale: float = 1.0,
    head_gradient: torch.Tensor | None = None,
) -> LossTerms:
    """A divergence of the student from the teacher, on the stored ids and the bucket of the rest.

    Args:
        hidden: (N, H) the student's last hidden states.
        head: (V, H) output embedding.
        offsets: (N+1,) int64; the entries of position i are [offsets[i], offsets[i+1]).
        ids: (nnz,) token ids, different within a position.
        weights: (nnz,) the teacher's probabilities of these ids. A position's sum may fall short
            of 1 by what the other ids have; a rest below 1e-6 counts as 1e-6, since float32 does
            not tell it from rounding and the reverse divergence is infinite at 0.
        divergence: "reverse-kl", sum(q log(q/p)), or "jsd", the generalised Jensen-Shannon
            divergence at beta = 0.5: (KL(p, m) + KL(q, m)) / 2 with m = (p+q) / 2.
        cross_entropy_targets: (N,) observed next tokens; -100 where there is none.
        cross_entropy_weight: factor of the cross-entropy term.
        bias: (V,) output bias.
        reduction: "mean" over the N positions, or "sum".
        scale: factor of all terms.
        head_gradient: as of :func:`seodang.student.losses.sparse_kd_terms`.

    Returns:
        The terms in nats; ``total`` is differentiable in ``hidden``, ``head`` and ``bias``. A
        position without entries and without an observed token costs nothing.

    Raises:
        ValueError: if the shapes do not fit together, or the divergence is not one of these.
    """
    if divergence not in _DIVERGENCES:
        raise ValueError(f"divergence {divergence!r}: use 'reverse-kl' or 'jsd'")
    return divergence_terms(
        _DIVERGENCES[divergence],
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


# A loss sum(g(p, q)) over categories has a = q dg/dq, and constants added to dg/dq cancel in
# a - t q. Both g below are written in x = log p - log q, so that neither q nor 1-Q may underflow.


def _reverse_kl(labels: LabelledRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a_E, b_R = (-torch.exp(log_q) * x for log_q, x in _log_ratios(labels))  # dg/dq: -x + 1
    return labels.sum(a_E) + b_R, a_E, b_R


def _jsd(labels: LabelledRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    halves = []
    for log_q, x in _log_ratios(labels):
        toward_student = _log_over_mean(x)  # log(q/m), which is also 2 dg/dq
        toward_teacher = _log_over_mean(-x)  # log(p/m)
        a = 0.5 * torch.exp(log_q) * toward_student
        halves.append((a + 0.5 * torch.exp(log_q + x) * toward_teacher, a))
    (value_E, a_E), (value_R, b_R) = halves
    return labels.sum(value_E) + value_R, a_E, b_R


def _log_ratios(labels: LabelledRows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(log q, log p - log q) of the stored ids and of the rest; (log tiny, 0) where q is 0."""
    tiny = torch.finfo(torch.float32).tiny
    log_p_E = labels.weights.clamp(min=tiny).log()
    log_p_R = (1.0 - labels.sum(labels.weights)).clamp(min=ROUNDING).log()
    pairs = []
    for log_p, log_q in ((log_p_E, labels.log_q), (log_p_R, labels.log_rest)):
        there = log_q.isfinite()
        log_q_there = torch.where(there, log_q, math.log(tiny))
        pairs.append((log_q_there, torch.where(there, log_p - log_q_there, 0.0)))
    return pairs


def _log_over_mean(x: torch.Tensor) -> torch.Tensor:
    """-log((1 + exp(x)) / 2), exact near 0 as well as far from it."""
    near = -torch.log1p(torch.expm1(x.clamp(max=1.0)) / 2)
    return torch.where(x < 1, near, math.log(2) - torch.nn.functional.softplus(x))


_DIVERGENCES = {
    "reverse-kl": Divergence("reverse-kl", True, _reverse_kl),
    "jsd": Divergence("jsd", True, _jsd),
}
