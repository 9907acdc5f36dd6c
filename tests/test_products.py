"""Products through oneDNN: the values and gradients of ``torch.nn.Linear``, at any shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seodang.training.products import linear, use_fast_products

SIZE = st.integers(1, 70)


@settings(deadline=None)
@given(st.integers(0, 70), SIZE, SIZE, st.booleans(), st.integers(0, 2**16))
def test_linear_is_the_product_in_float64(rows, inner, outer, with_bias, seed):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(rows, inner, generator=g), torch.randn(outer, inner, generator=g)
    bias = torch.randn(outer, generator=g) if with_bias else None
    expected = torch.nn.functional.linear(
        x.double(), w.double(), None if bias is None else bias.double()
    )
    torch.testing.assert_close(linear(x, w, bias).double(), expected, rtol=1e-5, atol=1e-5)
    mirrored = linear(x.T.contiguous().T, w.T.contiguous().T, bias)  # strides of a transpose
    torch.testing.assert_close(mirrored.double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), SIZE, SIZE, st.booleans())
def test_a_layer_trains_as_before(leading, inner, outer, with_bias):
    plain = torch.nn.Linear(inner, outer, bias=with_bias).double()
    fast = torch.nn.Sequential(torch.nn.Linear(inner, outer, bias=with_bias))
    fast[0].load_state_dict(plain.state_dict())
    use_fast_products(fast)
    x = torch.randn(*leading, inner, dtype=torch.float64, requires_grad=True)
    y = x.detach().float().requires_grad_()
    upstream = torch.randn(*leading, outer, dtype=torch.float64)
    plain(x).backward(upstream)
    fast(y).backward(upstream.float())
    pairs = [
        (x.grad, y.grad),
        *zip(
            (p.grad for p in plain.parameters()), (p.grad for p in fast.parameters()), strict=True
        ),
    ]
    for expected, found in pairs:
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one():
    layer = torch.nn.Linear(5, 3)
    layer.weight.requires_grad_(False)
    use_fast_products(layer)
    layer(torch.randn(2, 5)).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("kind", ["autocast", "double", "without oneDNN", "nothing"])
def test_whatever_else_goes_the_usual_way(kind):
    layer = torch.nn.Linear(5, 3)
    expected = torch.nn.Linear(5, 3)
    expected.load_state_dict(layer.state_dict())
    use_fast_products(layer)
    x = torch.randn(0 if kind == "nothing" else 4, 5)
    if kind == "double":
        layer, expected, x = layer.double(), expected.double(), x.double()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"),
        torch.backends.mkldnn.flags(enabled=kind != "without oneDNN"),
    ):
        found, wanted = layer(x), expected(x)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    found.sum().backward()


def test_a_layer_is_saved_as_before():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    names = list(model.state_dict())
    use_fast_products(model)
    assert list(model.state_dict()) == names
