"""Reverse KL and JSD on the k+1 partition against dense float64 formulae."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dense_divergences import compare, problems
from seodang.student import one_pass
from seodang.student.divergences import sparse_divergence_terms
from seodang.student.losses import sparse_kd_loss

KINDS = ["reverse-kl", "jsd"]


def divergence(problem, kind):
    return lambda hidden, head, bias: (
        sparse_divergence_terms(hidden, head, **problem.labels(), bias=bias, divergence=kind).total
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-5)])
@settings(deadline=None, max_examples=40)
@given(problem=problems(partition=True), rows=st.integers(1, 40), tile=st.sampled_from([1, 7, 999]))
def test_value_and_gradients_match_the_definition(kind, dtype, tolerance, problem, rows, tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "CHUNK_BYTES", rows * 4 * len(problem.head))
        patch.setattr(one_pass, "TILE", max(tile, len(problem.head) // 9))
        compare(problem, kind, divergence(problem, kind), dtype, tolerance)


def rows_of(logits, ids, weights):
    """One position with these logits, by an identity head."""
    hidden = torch.tensor([logits], requires_grad=True)
    arguments = (torch.tensor([0, len(ids)]), torch.tensor(ids), torch.tensor(weights))
    return hidden, (hidden, torch.eye(len(logits)), *arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_equals_the_teacher_has_neither_loss_nor_gradient(kind):
    p = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    hidden, arguments = rows_of(p.log().tolist(), [3, 0], [0.0625, 0.5])
    terms = sparse_divergence_terms(*arguments, divergence=kind)
    terms.total.backward()
    assert abs(float(terms.total.detach())) < 1e-7
    assert float(hidden.grad.abs().max()) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [[0.6, 0.4], [0.6, 0.4000001], [1.0, 0.0]])
@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [200.0, 0.0, 0.0], [0.0, 0.0, 200.0]])
def test_no_rest_and_saturated_students_stay_finite(kind, weights, logits):
    hidden, arguments = rows_of(logits, [0, 1], weights)
    total = sparse_divergence_terms(*arguments, divergence=kind).total
    total.backward()
    assert total.isfinite()
    assert hidden.grad.isfinite().all()
    assert float(total.detach()) > -1e-6


def test_jsd_is_bounded_by_log_2_and_symmetric():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    there = sparse_divergence_terms(
        *rows_of(q.log().tolist(), [0, 1], p[:2].tolist())[1], divergence="jsd"
    )
    back = sparse_divergence_terms(
        *rows_of(p.log().tolist(), [0, 1], q[:2].tolist())[1], divergence="jsd"
    )
    torch.testing.assert_close(there.total, back.total)
    far = rows_of([100.0, 0.0, 0.0], [1], [1.0])[1]
    torch.testing.assert_close(
        sparse_divergence_terms(*far, divergence="jsd").total,
        torch.tensor(2.0).log(),
        rtol=1e-4,
        atol=0,
    )


def test_reverse_kl_and_residual_agree_to_second_order():
    """Near the teacher forward and reverse KL of the k+1 categories are the same quadratic."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=g, dtype=torch.float64)
    p = logits.softmax(0)
    ids = logits.topk(6).indices
    step = 1e-3 * torch.randn(50, generator=g, dtype=torch.float64)
    arguments = (torch.eye(50).double(), torch.tensor([0, 6]), ids, p[ids])
    reverse = sparse_divergence_terms((logits + step)[None], *arguments, divergence="reverse-kl")
    forward = sparse_kd_loss((logits + step)[None], *arguments, residual=True)
    least = sparse_kd_loss(logits[None], *arguments, residual=True)
    torch.testing.assert_close(reverse.total, forward - least, rtol=1e-2, atol=0)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="use 'reverse-kl' or 'jsd'"):
        sparse_divergence_terms(*rows_of([0.0, 1.0], [0], [1.0])[1], divergence="forward-kl")
