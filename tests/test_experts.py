"""The routed experts' products: against the formula in float64, and which models get them."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seodang.foundation.model_config import hf_config
from seodang.training.experts import EXPERTS, LEAST_ROWS, grouped_experts, use_grouped_experts
from tiny_foundation import MODEL


@given(st.integers(1, 80), st.integers(0, 9), st.integers(1, 24))
@example(400, 0, 24)  # many rows of every expert
@settings(deadline=None, max_examples=15)
def test_the_experts_are_those_of_the_formula(tokens, seed, used):
    """Outputs and gradients against float64, expert by expert; most experts may have no token."""
    from transformers.models.axk1.modeling_axk1 import AXK1Experts

    torch.manual_seed(seed)
    model = MODEL.model_copy(update={"experts": 24})  # three groups in bfloat16
    experts = AXK1Experts(hf_config(model, model.vocabulary))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    top_k = min(2, used)
    chosen = torch.rand(tokens, used).topk(top_k).indices
    x, weights = torch.randn(tokens, MODEL.hidden_size), torch.rand(tokens, top_k)
    direction = torch.randn(tokens, MODEL.hidden_size)

    def unweighted(x, gate_up, down):
        found = []
        for pair, e in enumerate(chosen.flatten()):
            gate, up = (gate_up[e] @ x[pair // top_k]).chunk(2)
            found.append(down[e] @ (torch.nn.functional.silu(gate) * up))
        return torch.stack(found).unflatten(0, (tokens, top_k))

    def by_formula(x, gate_up, down, weights):
        return (weights[..., None] * unweighted(x, gate_up, down)).sum(1)

    def gradients(function, dtype):
        inputs = [x, experts.gate_up_proj, experts.down_proj, weights]
        inputs = [i.detach().to(dtype).requires_grad_() for i in inputs]
        found = function(*inputs)
        (found * direction.to(dtype)).sum().backward()
        return [found.detach(), *(i.grad for i in inputs)]

    class Parameters:
        pass

    def ours(x, gate_up, down, weights):
        parameters = Parameters()
        parameters.gate_up_proj, parameters.down_proj = gate_up, down
        return grouped_experts(parameters, x, chosen, weights)

    expected = gradients(by_formula, torch.float64)
    with patch.dict(LEAST_ROWS, dict.fromkeys(LEAST_ROWS, 0)):
        exact = gradients(ours, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = gradients(ours, torch.float32)
    for one, other in zip(exact, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    sizes = [other.norm() for other in expected]
    # The terms of a weight's gradient may cancel, so the error is measured by their size.
    with torch.no_grad():
        given = (t.double() for t in (x, experts.gate_up_proj, experts.down_proj))
        sizes[-1] = (direction.norm(dim=1)[:, None] * unweighted(*given).norm(dim=2)).norm()
    for one, other, size in zip(coarse, expected, sizes, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.03 * size


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_experts_that_are_not_trained_have_no_gradient(precision):
    from transformers.models.axk1.modeling_axk1 import AXK1Experts

    torch.manual_seed(0)
    experts = AXK1Experts(hf_config(MODEL, MODEL.vocabulary))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    chosen = torch.rand(50, MODEL.experts).topk(2).indices
    found = []
    for trained in (True, False):
        experts.requires_grad_(trained)
        x, weights = torch.ones(50, MODEL.hidden_size), torch.ones(50, 2)
        x.requires_grad_()
        weights.requires_grad_()
        with (
            patch.dict(LEAST_ROWS, {precision: 0}),
            torch.autocast("cpu", precision, precision == torch.bfloat16),
        ):
            grouped_experts(experts, x, chosen, weights).sum().backward()
        assert (experts.gate_up_proj.grad is not None) == trained
        experts.zero_grad(set_to_none=True)
        found.append((x.grad, weights.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_experts_of_the_formula_are_exchanged():
    from transformers import (
        AXK1ForCausalLM,
        GptOssConfig,
        GptOssForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    small = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    plain = AXK1ForCausalLM(hf_config(MODEL, MODEL.vocabulary))
    with_biases = GptOssForCausalLM(GptOssConfig(**small, num_local_experts=4))
    dense = LlamaForCausalLM(LlamaConfig(**small))
    for model in (plain, with_biases, dense):
        use_grouped_experts(model)
    assert plain.config._experts_implementation == EXPERTS
    assert with_biases.config._experts_implementation != EXPERTS
    assert dense.config._experts_implementation != EXPERTS


def test_few_tokens_are_those_of_transformers():
    """Where an expert has hardly a row, and where it has many, to the same figures."""
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.axk1.modeling_axk1 import AXK1Experts

    torch.manual_seed(0)
    experts = AXK1Experts(hf_config(MODEL, MODEL.vocabulary))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    many = LEAST_ROWS[torch.float32] * MODEL.experts // 2
    for tokens in (1, many - 1, many):
        chosen = torch.rand(tokens, MODEL.experts).topk(2).indices
        x, weights = torch.randn(tokens, MODEL.hidden_size), torch.rand(tokens, 2)
        found = grouped_experts(experts, x, chosen, weights)
        theirs = grouped_mm_experts_forward(experts, x, chosen, weights)
        assert torch.equal(found, theirs) == (tokens < many)
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
