"""sparse_kd_loss against plain float64 formulae on dense distributions."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from seodang.student import losses
from seodang.student.losses import sparse_kd_loss


def dense_reference(hidden, head, offsets, ids, weights, targets, ce_weight, bias, residual, mean):
    """The definition, position by position, in float64 with autograd."""
    logits = hidden @ head.T + (0 if bias is None else bias)
    log_q = torch.log_softmax(logits, -1)
    total = hidden.new_zeros(())
    for i in range(len(hidden)):
        part = slice(int(offsets[i]), int(offsets[i + 1]))
        total = total - (weights[part] * log_q[i, ids[part]]).sum()
        if residual and float(1 - weights[part].sum()) > 1e-6:
            keep = torch.ones(len(head), dtype=torch.bool)
            keep[ids[part]] = False
            rest = 1 - weights[part].sum()
            total = total - rest * torch.logsumexp(log_q[i][keep], 0)
        if targets is not None and targets[i] != -100:
            total = total - ce_weight * log_q[i, targets[i]]
    return total / max(1, len(hidden)) if mean else total


@st.composite
def problems(draw):
    residual = draw(st.booleans())
    n, h = draw(st.sampled_from([0, 1, 2, 7, 33])), draw(st.sampled_from([1, 3, 16]))
    v = draw(st.sampled_from([1, 2, 5, 130, 1031]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    counts = torch.randint(0, min(v, 9) + 1, (n,), generator=g)
    if n and draw(st.booleans()):
        counts[0] = v  # every id of the vocabulary
    rows = []
    for count in counts.tolist():
        if residual:
            ids = torch.randperm(v, generator=g)[:count]
            w = torch.rand(count, generator=g, dtype=torch.float64)
            w = w / w.sum().clamp(min=1e-9) * torch.rand((), generator=g, dtype=torch.float64)
            if count == v:
                w = w / w.sum()
        else:  # repeated ids, and weights that sum to anything
            ids = torch.randint(0, v, (count,), generator=g)
            w = torch.rand(count, generator=g, dtype=torch.float64) * 2
        rows.append((ids, w))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    ids = torch.cat([r[0] for r in rows] or [torch.zeros(0, dtype=torch.int64)])
    w = torch.cat([r[1] for r in rows] or [torch.zeros(0, dtype=torch.float64)])
    targets = None
    if draw(st.booleans()):
        targets = torch.randint(0, v, (n,), generator=g)
        targets[torch.rand(n, generator=g) < 0.3] = -100
    bias = torch.randn(v, generator=g, dtype=torch.float64) if draw(st.booleans()) else None
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64)
    head = torch.randn(v, h, generator=g, dtype=torch.float64)
    return hidden, head, offsets, ids, w, targets, bias, residual, draw(st.booleans())


@settings(deadline=None, max_examples=80)
@given(problems(), st.integers(1, 40))
def test_value_and_gradients_match_the_definition(problem, chunk_rows):
    hidden, head, offsets, ids, w, targets, bias, residual, mean = problem
    leaves64 = [hidden, head] + ([bias] if bias is not None else [])
    leaves32 = [x.float().requires_grad_() for x in leaves64]
    leaves64 = [x.clone().requires_grad_() for x in leaves64]
    expected = dense_reference(
        leaves64[0],
        leaves64[1],
        offsets,
        ids,
        w,
        targets,
        0.3,
        leaves64[2] if bias is not None else None,
        residual,
        mean,
    )
    losses_before = losses.CHUNK_BYTES
    losses.CHUNK_BYTES = chunk_rows * 4 * len(head)
    try:
        found = sparse_kd_loss(
            leaves32[0],
            leaves32[1],
            offsets,
            ids,
            w.float(),
            cross_entropy_targets=targets,
            cross_entropy_weight=0.3,
            bias=leaves32[2] if bias is not None else None,
            residual=residual,
            reduction="mean" if mean else "sum",
        )
    finally:
        losses.CHUNK_BYTES = losses_before
    torch.testing.assert_close(found.double(), expected.detach(), rtol=2e-5, atol=2e-5)
    (3 * found).backward()
    if expected.requires_grad:
        (3 * expected).backward()
    for a, b in zip(leaves32, leaves64, strict=True):
        grad = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(a.grad.double(), grad, rtol=1e-4, atol=1e-4)


def test_full_distribution_gives_cross_entropy_of_the_teacher():
    g = torch.Generator().manual_seed(0)
    n, v = 40, 300
    p = torch.softmax(3 * torch.randn(n, v, generator=g), -1)
    hidden, head = torch.randn(n, 8, generator=g), torch.randn(v, 8, generator=g)
    found = sparse_kd_loss(
        hidden, head, torch.arange(0, n * v + 1, v), torch.arange(v).repeat(n), p.reshape(-1)
    )
    expected = -(p * torch.log_softmax(hidden @ head.T, -1)).sum(-1).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 1])}, "offsets"),
        ({"ids": torch.tensor([1, 2, 3])}, "entries"),
        ({"head": torch.randn(5, 4)}, "do not fit"),
        ({"cross_entropy_targets": torch.tensor([1])}, "targets"),
        ({"reduction": "none"}, "reduction"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    arguments = {
        "hidden": torch.randn(2, 3),
        "head": torch.randn(5, 3),
        "offsets": torch.tensor([0, 1, 2]),
        "ids": torch.tensor([1, 2]),
        "weights": torch.ones(2),
    } | change
    with pytest.raises(ValueError, match=message):
        sparse_kd_loss(**arguments)
