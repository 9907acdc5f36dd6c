"""Sparse losses as they are defined: dense, position by position, in float64 with autograd."""

import dataclasses

import hypothesis.strategies as st
import torch


@dataclasses.dataclass
class Problem:
    hidden: torch.Tensor
    head: torch.Tensor
    offsets: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    cross_entropy_targets: torch.Tensor | None
    bias: torch.Tensor | None
    cross_entropy_weight: float
    reduction: str

    def leaves(self, dtype):
        """Copies of hidden, head and bias that want gradients."""
        tensors = [self.hidden, self.head, self.bias]
        return [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in tensors]

    def labels(self):
        return {
            "offsets": self.offsets,
            "ids": self.ids,
            "weights": self.weights,
            "cross_entropy_targets": self.cross_entropy_targets,
            "cross_entropy_weight": self.cross_entropy_weight,
            "reduction": self.reduction,
        }


def reference(problem, kind, hidden, head, bias):
    """``kind``: "cross-entropy", "residual", "reverse-kl" or "jsd"."""
    logits = hidden @ head.T + (0 if bias is None else bias)
    log_q = torch.log_softmax(logits, -1)
    total = 0.0 * hidden.sum()
    for i in range(len(hidden)):
        part = slice(int(problem.offsets[i]), int(problem.offsets[i + 1]))
        ids, p = problem.ids[part], problem.weights[part].double()
        if len(ids):
            others = torch.ones(len(head), dtype=torch.bool)
            others[ids] = False
            total = total + _divergence(kind, p, log_q[i, ids], log_q[i][others])
        targets = problem.cross_entropy_targets
        if targets is not None and targets[i] != -100:
            total = total - problem.cross_entropy_weight * log_q[i, targets[i]]
    return total / max(1, len(hidden)) if problem.reduction == "mean" else total


def _divergence(kind, p, log_q, log_q_others):
    rest = 1 - p.sum()
    if kind == "cross-entropy":
        return -(p * log_q).sum()
    if kind == "residual":
        value = -(p * log_q).sum()
        if float(rest) > 1e-6 and len(log_q_others):
            value = value - rest * torch.logsumexp(log_q_others, 0)
        return value
    if len(log_q_others):
        p = torch.cat([p, rest.clamp(min=1e-6)[None]])
        log_q = torch.cat([log_q, torch.logsumexp(log_q_others, 0)[None]])
    q, log_p = log_q.exp(), p.log()
    if kind == "reverse-kl":
        return (q * (log_q - log_p)).sum()
    log_m = ((p + q) / 2).log()
    return ((p * (log_p - log_m)).sum() + (q * (log_q - log_m)).sum()) / 2


@st.composite
def problems(draw, *, partition):
    """Random hidden states, heads and labels; ``partition``: distinct ids, sums up to 1."""
    n, h = draw(st.sampled_from([0, 1, 2, 7, 33])), draw(st.sampled_from([1, 3, 16]))
    v = draw(st.sampled_from([1, 2, 5, 130, 1031]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.1, 1.0, 3.0]))
    counts = torch.randint(0, min(v, 9) + 1, (n,), generator=g)
    if n and draw(st.booleans()):
        counts[0] = v  # every id of the vocabulary
    if draw(st.booleans()):
        counts[torch.rand(n, generator=g) < 0.5] = 0
    rows = []
    for count in counts.tolist():
        weights = torch.rand(count, generator=g, dtype=torch.float64) + 1e-3
        if partition:
            ids = torch.randperm(v, generator=g)[:count]
            weights = weights / weights.sum()
            if count < v and draw(st.booleans()):
                weights = weights * torch.rand((), generator=g, dtype=torch.float64)
        else:  # repeated ids, and weights that sum to anything
            ids = torch.randint(0, v, (count,), generator=g)
            weights = weights * 2
        rows.append((ids, weights))
    targets = None
    if draw(st.booleans()):
        targets = torch.randint(0, v, (n,), generator=g)
        targets[torch.rand(n, generator=g) < 0.3] = -100
    none = torch.zeros(0)
    return Problem(
        hidden=spread * torch.randn(n, h, generator=g, dtype=torch.float64),
        head=torch.randn(v, h, generator=g, dtype=torch.float64),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        ids=torch.cat([row[0] for row in rows] or [none.long()]),
        weights=torch.cat([row[1] for row in rows] or [none.double()]),
        cross_entropy_targets=targets,
        bias=torch.randn(v, generator=g, dtype=torch.float64) if draw(st.booleans()) else None,
        cross_entropy_weight=0.3,
        reduction=draw(st.sampled_from(["mean", "sum"])),
    )


def compare(problem, kind, loss, dtype, tolerance, upstream=3.0):
    """Value and gradients of ``loss(hidden, head, bias)`` against the definition in float64.

    ``tolerance`` is relative to the largest row of weights, since the gradient of a row is a
    difference of terms of that size.
    """
    found_leaves, leaves = problem.leaves(dtype), problem.leaves(torch.float64)
    expected = reference(problem, kind, *leaves)
    found = loss(*found_leaves)
    size = max(1.0, float(problem.weights.sum()))
    atol = tolerance * size
    torch.testing.assert_close(found.double(), expected.detach(), rtol=tolerance, atol=atol)
    (upstream * found).backward()
    (upstream * expected).backward()
    for a, b in zip(found_leaves, leaves, strict=True):
        if a is not None:
            grad = torch.zeros_like(b) if b.grad is None else b.grad
            torch.testing.assert_close(a.grad.double(), grad, rtol=tolerance, atol=3 * atol)
