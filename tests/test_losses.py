"""sparse_kd_loss against plain float64 formulae on dense distributions."""

import weakref

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dense_divergences import compare, problems
from seodang.student import one_pass
from seodang.student.losses import sparse_kd_loss, sparse_kd_terms


def kd(problem, kind):
    return lambda hidden, head, bias: sparse_kd_loss(
        hidden, head, **problem.labels(), bias=bias, residual=kind == "residual"
    )


@pytest.mark.parametrize("kind", ["cross-entropy", "residual"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@settings(deadline=None, max_examples=50)
@given(data=st.data(), rows=st.integers(1, 40), tile=st.sampled_from([1, 7, 999]))
def test_value_and_gradients_match_the_definition(kind, dtype, tolerance, data, rows, tile):
    problem = data.draw(problems(partition=kind == "residual"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "CHUNK_BYTES", rows * 4 * len(problem.head))
        patch.setattr(one_pass, "TILE", max(tile, len(problem.head) // 9))
        compare(problem, kind, kd(problem, kind), dtype, tolerance)


@settings(deadline=None, max_examples=20)
@given(problem=problems(partition=False))
def test_without_onednn_the_same(problem):
    torch.backends.mkldnn.enabled, before = False, torch.backends.mkldnn.enabled
    try:
        compare(problem, "cross-entropy", kd(problem, "cross-entropy"), torch.float32, 2e-5)
    finally:
        torch.backends.mkldnn.enabled = before


@pytest.mark.parametrize("kind", ["cross-entropy", "residual"])
@settings(deadline=None, max_examples=30)
@given(data=st.data(), rows=st.integers(1, 40))
def test_a_scale_and_a_place_for_the_head_gradient_change_no_gradient(kind, data, rows):
    problem = data.draw(problems(partition=kind == "residual"))

    def loss(hidden, head, bias):
        head.grad = torch.zeros_like(head)
        total = sparse_kd_terms(
            hidden, head, **problem.labels(), bias=bias, residual=kind == "residual",
            scale=3.0, head_gradient=head.grad,
        ).total  # fmt: skip
        return total / 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "CHUNK_BYTES", rows * 4 * len(problem.head))
        compare(problem, kind, loss, torch.float64, 1e-9, upstream=3.0)


def test_the_head_gradient_is_added_to_what_is_there_without_a_second_tensor():
    hidden, head, *labels = many_rows()
    _, grad_hidden, grad_head = gradients(
        lambda x, w: dense_total(x, w, *labels), hidden, head, torch.float64
    )
    x, w = hidden.float().requires_grad_(), head.float().requires_grad_()
    before = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    there = before.clone()
    with Allocations(x, w, there, *labels) as allocations:
        total = sparse_kd_terms(x, w, *labels, scale=0.5, head_gradient=there).total
        total.backward()
    assert relative_error(2 * (there - before), grad_head) < 1e-3  # before is rounded
    assert relative_error(2 * x.grad, grad_hidden) < 1e-5
    assert w.grad is None
    assert 0 < allocations.largest < w.nbytes


def many_rows(n=300, v=5000, h=64, k=12, seed=0):
    """A larger problem, with distinct ids: (hidden, head, offsets, ids, weights), float64."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64)
    head = 0.5 * torch.randn(v, h, generator=g, dtype=torch.float64)
    ids = torch.rand(n, v, generator=g).topk(k).indices.reshape(-1)
    weights = torch.rand(n * k, generator=g, dtype=torch.float64) / k
    return hidden, head, torch.arange(0, n * k + 1, k), ids, weights


def dense_total(hidden, head, offsets, ids, weights):
    rows = torch.repeat_interleave(offsets.diff())
    dense = torch.zeros(len(hidden), len(head), dtype=torch.float64)
    dense.index_put_((rows, ids), weights.double(), accumulate=True)
    return -(dense * torch.log_softmax(hidden @ head.T, -1)).sum(-1).mean()


def gradients(loss, hidden, head, dtype=None, head_dtype=None):
    x = hidden.to(dtype or hidden.dtype, copy=True).requires_grad_()
    w = head.to(head_dtype or dtype or head.dtype, copy=True).requires_grad_()
    total = loss(x, w)
    total.backward()
    return total.detach(), x.grad, w.grad


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", [0, 1])
def test_float32_is_within_a_hundred_thousandth_of_float64(seed):
    hidden, head, *labels = many_rows(seed=seed)
    expected = gradients(lambda x, w: dense_total(x, w, *labels), hidden, head)
    found = gradients(lambda x, w: sparse_kd_loss(x, w, *labels), hidden, head, torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5
        assert a.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "head_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_low_precision_is_about_as_exact_as_dense_products_of_that_type(dtype, head_dtype):
    hidden, head, *labels = many_rows()
    rounded = hidden.to(dtype).double(), head.to(dtype).double()
    expected = gradients(lambda x, w: dense_total(x, w, *labels), *rounded)

    def dense(x, w):  # the logits leave the product in this type, as in a model
        logits = (x @ w.T).double()
        return dense_total(logits, torch.eye(len(w)).double(), *labels)

    usual = gradients(dense, hidden, head, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=head_dtype != dtype):
        found = gradients(
            lambda x, w: sparse_kd_loss(x, w, *labels), hidden, head, dtype, head_dtype
        )
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, head_dtype]
    assert relative_error(found[0], expected[0]) < 1e-3
    for a, plain, exact in zip(found[1:], usual[1:], expected[1:], strict=True):
        assert relative_error(a, exact) < 1.25 * relative_error(plain, exact)


def test_layout_of_the_inputs_does_not_matter():
    hidden, head, *labels = many_rows(n=70, v=300)
    expected = gradients(lambda x, w: sparse_kd_loss(x, w, *labels), hidden.float(), head.float())
    x = hidden.float().T.contiguous().T.requires_grad_()
    w = torch.stack([head.float()] * 2, -1)[..., 0].requires_grad_()
    assert not x.is_contiguous()
    assert not w.is_contiguous()
    total = sparse_kd_loss(x, w, *labels)
    total.backward()
    torch.testing.assert_close((total.detach(), x.grad, w.grad), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_another_logit_far_above_the_labels(residual):
    """The shift by a labelled logit overflows: the chunk is done again with the maximum."""
    hidden, head, offsets, ids, weights = many_rows(n=40, v=50, h=4, k=3)
    hidden[5] = torch.tensor([300.0, 0, 0, 0])
    head[:, 0] = torch.linspace(-1, 1, 50)
    ids[15:18] = torch.tensor([0, 1, 2])
    weights[15:18] = torch.tensor([0.5, 0.3, 0.2])

    def dense(x, w):
        return dense_total(x, w, offsets, ids, weights)

    if residual:  # only rows without a rest have the value of the dense formula
        weights /= weights.reshape(40, 3).sum(-1).repeat_interleave(3)
    found = gradients(
        lambda x, w: sparse_kd_loss(x, w, offsets, ids, weights, residual=residual),
        hidden,
        head,
        torch.float32,
    )
    for a, b in zip(found, gradients(dense, hidden, head), strict=True):
        assert relative_error(a, b) < 1e-5


def test_positions_without_labels_cost_nothing():
    """They are left out before the products: not even a NaN in them is seen."""
    hidden, head, _, ids, weights = many_rows(n=6, v=40, k=2)
    offsets = torch.tensor([0, 0, 4, 4, 4, 4, 12])
    targets = torch.tensor([-100, -100, -100, 7, -100, 1])
    ignored = torch.tensor([0, 2, 4])
    kept = torch.tensor([1, 3, 5])

    def loss(x, w, o, t):
        return sparse_kd_loss(
            x, w, o, ids, weights, cross_entropy_targets=t, cross_entropy_weight=0.5,
            reduction="sum",
        )  # fmt: skip

    expected = gradients(
        lambda x, w: loss(x, w, torch.tensor([0, 4, 4, 12]), targets[kept]), hidden[kept], head
    )
    hidden[ignored] = torch.nan
    total, grad_hidden, grad_head = gradients(
        lambda x, w: loss(x, w, offsets, targets), hidden, head
    )
    torch.testing.assert_close((total, grad_hidden[kept], grad_head), expected)
    assert (grad_hidden[ignored] == 0).all()


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_labelled_is_a_loss_of_zero(n):
    none = torch.zeros(0)
    total, grad_hidden, grad_head = gradients(
        lambda x, w: sparse_kd_loss(x, w, torch.zeros(n + 1).long(), none.long(), none),
        torch.randn(n, 4),
        torch.randn(9, 4),
    )
    assert float(total) == 0
    assert grad_hidden.shape == (n, 4)
    assert (grad_hidden == 0).all()
    assert (grad_head == 0).all()


def test_gradients_accumulate_and_a_graph_is_gone_through_once():
    hidden, head, *labels = many_rows(n=50, v=200)
    x, w = hidden.float().requires_grad_(), head.float().requires_grad_()
    sparse_kd_loss(x, w, *labels).backward()
    once = w.grad.clone()
    loss = sparse_kd_loss(x, w, *labels)
    (2 * loss).backward(retain_graph=True)
    torch.testing.assert_close(w.grad, 3 * once)
    with pytest.raises(RuntimeError, match="backward"):
        loss.backward()


def test_terms_add_up_and_need_no_gradients():
    hidden, head, *labels = many_rows(n=50, v=200)
    targets = torch.arange(50)
    with torch.no_grad():
        terms = sparse_kd_terms(
            hidden, head, *labels, cross_entropy_targets=targets, cross_entropy_weight=0.25
        )
    observed = torch.nn.functional.cross_entropy(hidden @ head.T, targets)
    torch.testing.assert_close(terms.cross_entropy, observed)
    torch.testing.assert_close(terms.kd_loss, dense_total(hidden, head, *labels))
    torch.testing.assert_close(terms.total, terms.kd_loss + 0.25 * terms.cross_entropy)


class Allocations(TorchDispatchMode):
    """Bytes of the storages that PyTorch's operations saw and that are alive, and their peak.

    ``largest`` is that of one beside ``inputs``.
    """

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.live, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    if key not in self.inputs:
                        self.largest = max(self.largest, storage.nbytes())
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return found


@pytest.mark.parametrize("residual", [False, True])
def test_extra_memory_is_an_eighth_of_the_logits(residual):
    n, v, h = 1024, 49_152, 8
    hidden, head, *labels = many_rows(n=n, v=10, h=h, k=4)
    head = torch.randn(v, h, requires_grad=True)
    hidden = hidden.float().requires_grad_()
    inputs = hidden.nbytes + head.nbytes + sum(tensor.nbytes for tensor in labels)
    with Allocations() as allocations:
        sparse_kd_loss(hidden, head, *labels, residual=residual)
    gradients = hidden.nbytes + head.nbytes
    assert allocations.peak > n * v * 4 / 10  # the measure sees the chunks
    assert allocations.peak - gradients - inputs < n * v * 4 / 8


@pytest.mark.parametrize(
    ("rows", "ids", "chunk"),
    [(283, 49_152, 144), (283, 8_192, 288), (1024, 49_152, 104), (1024, 163_840, 104), (0, 9, 8)],
)
def test_a_small_batch_is_cut_into_few_chunks_and_a_large_one_by_its_share(rows, ids, chunk):
    assert one_pass.rows_of_chunk(rows, ids, 4) == chunk


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
