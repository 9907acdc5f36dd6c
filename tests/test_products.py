"""Products through oneDNN: the values and gradients of ``torch.nn.Linear``, at any shape."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from seodang.causal_lm import CausalLM
from seodang.training.gated_mlp import use_lean_mlps
from seodang.training.products import FEW_ROWS, linear, use_fast_products
from tiny import tiny_teacher

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


def test_a_loaded_model_computes_by_them(tmp_path):
    model = CausalLM.load(tiny_teacher(tmp_path / "model"))
    ids = torch.arange(3 * FEW_ROWS)[None]
    found = []
    for enabled in (True, False):
        with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=enabled):
            hidden = model.body(ids, use_cache=False).last_hidden_state[0]
            found.append(model.log_probs(hidden))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    with torch.profiler.profile() as profile, torch.inference_mode():
        model.log_probs(model.body(ids, use_cache=False).last_hidden_state[0])
    products = [event.key for event in profile.key_averages() if "linear" in event.key]
    assert products == ["mkldnn::_linear_pointwise"]


def gated_mlp(hidden, inner, bias=False, **changes):
    shape = {"hidden_size": hidden, "intermediate_size": inner, "mlp_bias": bias}
    return LlamaMLP(LlamaConfig(num_attention_heads=1, head_dim=2, **shape, **changes))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), SIZE, SIZE, st.booleans())
def test_a_gated_mlp_trains_as_before(leading, hidden, inner, with_bias):
    lean = gated_mlp(hidden, inner, with_bias)
    plain = copy.deepcopy(lean).double()
    use_lean_mlps(lean)
    x = torch.randn(*leading, hidden, dtype=torch.float64, requires_grad=True)
    y = x.detach().float().requires_grad_()
    upstream = torch.randn(*leading, hidden, dtype=torch.float64)
    expected, found = plain(x), lean(y)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    expected.backward(upstream)
    found.backward(upstream.float())
    torch.testing.assert_close(y.grad.double(), x.grad, rtol=1e-4, atol=1e-4)
    for p, q in zip(plain.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(q.grad.double(), p.grad, rtol=1e-4, atol=1e-4)


def test_a_gated_mlp_keeps_two_activations_of_the_inner_width():
    def kept(mlp):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.shape[-1]) or tensor, lambda tensor: tensor
        ):
            mlp(torch.randn(FEW_ROWS, 4, requires_grad=True))
        return sizes.count(33)

    mlp = gated_mlp(4, 33)
    use_fast_products(mlp)
    usual = kept(mlp)
    use_lean_mlps(mlp)
    assert kept(mlp) < usual - 1


@pytest.mark.parametrize("kind", ["gelu", "autocast", "another class"])
def test_other_mlps_go_the_usual_way(kind):
    mlp = gated_mlp(6, 8, hidden_act="gelu" if kind == "gelu" else "silu")
    if kind == "another class":
        mlp.__class__ = type("AnotherMLP", (LlamaMLP,), {})
    other, x = copy.deepcopy(mlp), torch.randn(FEW_ROWS, 6)
    use_lean_mlps(mlp)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found, expected = mlp(x), other(x)
    assert "_GatedProduct" not in found.grad_fn.name()
    assert torch.equal(found, expected)


def test_only_what_needs_a_gradient_gets_one():
    layer = torch.nn.Linear(5, 3)
    layer.weight.requires_grad_(False)
    use_fast_products(layer)
    layer(torch.randn(FEW_ROWS, 5)).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), float(FEW_ROWS)))


@pytest.mark.parametrize("kind", ["autocast", "double", "without oneDNN", "nothing", "few rows"])
def test_whatever_else_goes_the_usual_way(kind):
    layer = torch.nn.Linear(5, 3)
    expected = torch.nn.Linear(5, 3)
    expected.load_state_dict(layer.state_dict())
    use_fast_products(layer)
    rows = {"nothing": 0, "few rows": FEW_ROWS - 1}.get(kind, FEW_ROWS)
    x = torch.randn(rows, 5)
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
