"""The plan's counts against real models, its laws against what their papers say of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from seodang.cli_foundation import foundation_app
from seodang.errors import InputError
from seodang.foundation.model_config import ModelConfig, hf_config
from seodang.foundation.planning import flops, parameters, plan, scaling_laws
from seodang.foundation.planning.layout import (
    PUBLISHED,
    Layout,
    check_layout,
    parse_layout,
    pipeline_stages,
)
from seodang.foundation.presets import PRESETS

DOCS = Path(__file__).parents[1] / "docs"


def preset(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"preset": name, **changes})


TINY = preset(
    "laptop-nano", layers=3, hidden_size=64, vocabulary=256, experts=8, groups=4, q_lora_rank=48
)


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    """Any shape that obeys the rules, with odd numbers wherever they are allowed."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    layers, groups, heads = number(1, 5), number(1, 4), number(1, 5)
    hidden, nope, value = number(8, 40), number(1, 9), number(1, 9)
    experts, chosen = groups * number(2, 4), number(1, groups)
    rope = 2 * number(1, 4)
    factor = draw(st.sampled_from([1.0, 4.0]))
    return ModelConfig(
        hidden_size=hidden,
        layers=layers,
        dense_layers=number(0, layers),
        heads=heads,
        q_lora_rank=number(1, min(hidden, heads * (nope + rope))),
        kv_lora_rank=number(1, min(hidden, heads * (nope + value))),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
        intermediate_size=number(1, 50),
        expert_intermediate_size=number(1, 20),
        experts=experts,
        shared_experts=number(1, 3),
        experts_per_token=number(1, chosen * experts // groups),
        groups=groups,
        groups_per_token=chosen,
        vocabulary=number(2, 300),
        context=int(32 * factor),
        yarn_factor=factor,
        tied_embeddings=draw(st.booleans()),
    )


def counted(config: ModelConfig) -> tuple[int, int]:
    """All and active parameters of the library's model, on the meta device."""
    from transformers import AXK1ForCausalLM

    with torch.device("meta"):
        model = AXK1ForCausalLM(hf_config(config, config.vocabulary))
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    return total, total - routed + routed * config.experts_per_token // config.experts


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_have_the_parameters_that_the_library_builds(name: str) -> None:
    config = preset(name)
    assert counted(config) == (
        parameters.total_parameters(config),
        parameters.active_parameters(config),
    )


def test_published_model_has_its_published_size() -> None:
    config = preset("a.x-k1")
    assert parameters.total_parameters(config) == 518_983_052_288
    assert parameters.active_parameters(config) == 32_779_332_608
    assert parameters.kv_cache_bytes(config) == 70_272


@settings(max_examples=25, deadline=None)
@given(shapes())
def test_any_shape_has_the_parameters_that_the_library_builds(config: ModelConfig) -> None:
    assert counted(config) == (
        parameters.total_parameters(config),
        parameters.active_parameters(config),
    )


@settings(max_examples=8, deadline=None)
@given(shapes(), st.integers(2, 24))
def test_forward_flops_are_those_that_a_real_model_computes(
    config: ModelConfig, context: int
) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AXK1ForCausalLM

    torch.manual_seed(0)
    library = hf_config(config, config.vocabulary)
    library._attn_implementation = "eager"
    model = AXK1ForCausalLM(library).eval()
    model.set_experts_implementation("eager")
    ids = torch.randint(0, config.vocabulary, (1, context))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    # Eager attention computes the whole square.
    expected = context * sum(flops.forward_flops(config, context, causal=False).values())
    angles = context * config.qk_rope_head_dim  # a product in some versions of the library
    assert counter.get_total_flops() - expected in {0, angles}


def test_causal_mask_leaves_half_of_the_square() -> None:
    pairs = sum(position + 1 for position in range(1000))
    assert 1000 * flops.mean_attended(1000) == pairs


def test_training_is_three_times_forward_with_the_prediction_layers() -> None:
    config = preset("a.x-k1")
    without = preset("a.x-k1", mtp_layers=0)
    forward = sum(flops.forward_flops(config, 4096).values())
    assert flops.training_flops(without, 4096) == 3 * forward
    # A layer like the last one, a projection of two widths onto one, and the head once more.
    c, layer = config, parameters.mtp_layer(config)
    norms = parameters.layer_norms(c, sparse=True) + 3 * c.hidden_size
    weights = layer.active - norms + c.hidden_size * c.vocabulary
    scores = flops.attention_scores(c, flops.mean_attended(4096))
    assert flops.mtp_flops(c, 4096) == 2 * weights + scores


def test_prediction_layer_is_as_large_as_the_one_that_is_trained() -> None:
    from seodang.foundation.pretraining.mtp import MultiTokenPrediction

    config = preset("a.x-k1")
    with torch.device("meta"):
        layer = MultiTokenPrediction(hf_config(config, config.vocabulary))
    assert sum(weight.numel() for weight in layer.parameters()) == (
        parameters.mtp_layer(config).total
    )


def test_published_run_is_reproduced() -> None:
    """2.55e24 FLOPs on 1,024 H200 in 75 days are 38.9 % of 989 TFLOP/s, and the reverse."""
    assert pytest.approx(0.389, rel=0.002) == plan.PUBLISHED_UTILISATION
    assert plan.days_of(2.55e24, 1024, 0.389, 989e12) == pytest.approx(75, rel=0.002)


@given(st.floats(1e18, 1e26), st.integers(1, 4096), st.floats(0.01, 1))
def test_days_and_utilisation_are_inverse(total: float, devices: int, utilisation: float) -> None:
    days = plan.days_of(total, devices, utilisation, 989e12)
    assert plan.utilisation_of(total, devices, days, 989e12) == pytest.approx(utilisation)


def test_efficiency_leverage_says_what_its_paper_says() -> None:
    """Tian et al.: more than 7 at 1e22, A 3.1 %, G 12; the optimum within 8 to 12; 1 if dense."""
    leverage = scaling_laws.efficiency_leverage
    assert 7 < leverage(0.031, 12, 1e22) < 7.5
    best = max(range(1, 65), key=lambda fine: leverage(0.031, fine, 1e22))
    low, high = scaling_laws.OPTIMAL_GRANULARITY
    assert low <= best <= high
    assert leverage(1.0, 2, 1e20) == pytest.approx(1, abs=0.02)
    assert leverage(0.031, 12, 1e23) > leverage(0.031, 12, 1e22) > leverage(0.08, 12, 1e22)


@pytest.mark.parametrize("flops_base", [2, 10, math.e])
@pytest.mark.parametrize("granularity_base", [2, 10, math.e])
def test_only_one_reading_of_its_logarithms_gives_that(
    flops_base: float, granularity_base: float
) -> None:
    saturated = 0.031 + 1.63e-2
    fine = math.log(12, granularity_base)
    exponent = 1.23 - 7.61e-2 * math.log(1e22, flops_base) + 1.67e-2 * fine**2 - 1.17e-1 * fine
    best = granularity_base ** (1.17e-1 / (2 * 1.67e-2))
    as_stated = 7 < saturated**exponent < 8 and 8 <= best <= 12
    assert as_stated == ((flops_base, granularity_base) == (10, 2))


@given(st.floats(1e17, 1e26))
def test_optimal_tokens_and_model_scale_are_of_one_law(budget: float) -> None:
    """Table 1 gives both; they multiply to the budget, and ours is its second column."""
    scale = scaling_laws.optimal_model_scale(budget)
    tokens = scaling_laws.optimal_tokens(scale)
    assert tokens == pytest.approx(budget / scale, rel=1e-6)
    assert tokens == pytest.approx(5.2232 * budget**0.4905, rel=1e-3)


def test_vocabulary_law_gives_what_its_paper_and_the_report_give() -> None:
    # The abstract of Tao et al.: 70 B at a width of 8,192 should have had at least 216,000.
    config = preset("30b", hidden_size=8192)
    others = parameters.active_parameters(config) - parameters.vocabulary_parameters(config)
    found = scaling_laws.optimal_vocabulary(config)
    isoflops = found["isoflops"] * (70e9 / others) ** (2 * 0.4163622634135234)
    assert isoflops == pytest.approx(216_000, rel=0.03)
    derivative = found["derivative"] * (70e9 / others) ** 0.8353974035228025
    assert derivative == pytest.approx(216_000, rel=0.08)
    # The report of A.X K1: about 132,500, before a quarter was added.
    found = scaling_laws.optimal_vocabulary(preset("a.x-k1"))
    assert found["derivative"] == pytest.approx(132_500, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(shapes(), st.integers(1, 7))
def test_stages_hold_every_layer_once_and_evenly(config: ModelConfig, pp: int) -> None:
    stages = pipeline_stages(config, Layout(pp=min(pp, config.layers)))
    flat = [kind for stage in stages for kind in stage]
    assert flat == ["embedding", *["dense"] * config.dense_layers] + [
        "sparse"
    ] * config.moe_layers + ["head"]
    sizes = [sum(kind in {"dense", "sparse"} for kind in stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"groups": 3}, "experts (8) must be a multiple of groups (3)"),
        ({"groups": 8, "groups_per_token": 8}, "two best experts"),
        ({"groups_per_token": 5}, "groups_per_token (5) cannot be more than groups (4)"),
        ({"experts_per_token": 7, "groups_per_token": 3}, "= 6"),
        ({"qk_rope_head_dim": 7}, "must be even"),
        ({"q_lora_rank": 65}, "hidden_size (64)"),
        ({"kv_lora_rank": 64, "heads": 1, "v_head_dim": 31}, "heads x (qk_nope + v) (63)"),
        ({"dense_layers": 4}, "dense_layers (4)"),
        ({"context": 1022, "yarn_factor": 4.0}, "whole number of positions"),
        ({"heads": 0}, "greater than 0"),
        ({"head": 4}, "Extra inputs"),
        ({"preset": "a.x-k9"}, "there are laptop-nano"),
    ],
)
def test_dimensions_that_conflict_are_refused_with_the_rule(
    changes: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        ModelConfig.model_validate(TINY.model_dump() | changes)
    assert rule in str(refused.value)


def test_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match=r"257 tokens.*only 256.*model\.vocabulary"):
        hf_config(TINY, 257)


@pytest.mark.parametrize(
    ("text", "devices", "problem"),
    [
        ("tp=3,pp=2", 8, "tp x pp x cp is 6, which does not divide 8 devices"),
        ("tp=2,dp=2", 8, "tp x pp x cp x dp is 4, but there are 8 devices"),
        ("tp=2,dp=5", 8, "tp x pp x cp x dp is 10, which does not divide 8 devices"),
        ("tp=0", 8, "`tp=0` is not one of these"),
        ("xp=2", None, "`xp=2` is not one of these"),
        ("tp", None, "`tp` is not one of these"),
        ("tp=1,tp=2", None, "`tp` stands there twice"),
    ],
)
def test_layouts_that_do_not_divide_the_devices_are_refused(
    text: str, devices: int | None, problem: str
) -> None:
    with pytest.raises(InputError) as refused:
        parse_layout(text, devices)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        (Layout(tp=3), "tp (3) must divide the heads (4)"),
        (Layout(ep=3, dp=3), "ep (3) must divide the routed experts (8)"),
        (Layout(ep=4, dp=2), "tp x cp x dp is 2"),
        (Layout(pp=4), "pp (4) cannot be more than the layers (3)"),
        (Layout(cp=3), "6 must divide the sequence"),
    ],
)
def test_layouts_that_break_a_rule_of_the_model_are_refused(layout: Layout, rule: str) -> None:
    with pytest.raises(InputError) as refused:
        check_layout(TINY, layout, 1024)
    assert rule in str(refused.value)


def test_data_parallelism_takes_the_devices_that_remain() -> None:
    assert parse_layout("pp=16,ep=8,cp=4", 1024) == PUBLISHED
    assert parse_layout(None, 8) == Layout(dp=8)
    assert parse_layout("tp=2", None) == Layout(tp=2)


def plan_json(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(foundation_app, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_command_gives_the_plan_of_the_published_model() -> None:
    found = plan_json("--preset", "a.x-k1")
    assert found["parameters"]["total"] == 518_983_052_288
    assert found["parameters"]["active"] == 32_779_332_608
    assert found["kv_bytes_per_token"] == 70_272
    assert found["layout"] == {"tp": 1, "pp": 16, "ep": 8, "cp": 4, "dp": 16, "devices": 1024}
    assert found["published_run"]["utilisation"] == pytest.approx(0.389, rel=0.02)
    assert found["assumptions"]
    parts = found["parameters"]["components"]
    assert sum(part["total"] for part in parts) == found["parameters"]["total"]


def test_command_takes_speeds_that_were_stated_or_measured() -> None:
    stated = plan_json("--preset", "1b", "--utilisation", "0.4", "--tokens", "1e10")
    assert stated["run"]["utilisation_is"] == "stated"
    assert not any("utilisation" in text for text in stated["assumptions"])
    speed = 0.4 * 989e12 / stated["flops_per_token"]["training"]
    measured = plan_json("--preset", "1b", "--tokens-per-second", str(speed), "--tokens", "1e10")
    assert measured["run"]["utilisation"] == pytest.approx(0.4)
    assert measured["run"]["days"] == pytest.approx(stated["run"]["days"])
    halved = plan_json(
        "--preset", "1b", "--utilisation", "0.4", "--tokens", "1e10", "--devices", "2"
    )
    assert halved["run"]["days"] == pytest.approx(stated["run"]["days"] / 2)


RECIPE = """
name: x
corpus:
  sources:
    - {name: s, path: text, license: CC0-1.0}
model:
  preset: laptop-nano
  layers: 9
"""


def test_command_reads_the_model_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "foundation.yaml"
    recipe.write_text(RECIPE)
    assert plan_json(str(recipe))["model"] == preset("laptop-nano", layers=9).model_dump()
    assert plan_json(str(recipe), "--set", "model.layers=8")["model"]["layers"] == 8
    arguments = ["plan", str(recipe), "--json", "--set", "model.groups=7"]
    refused = CliRunner().invoke(foundation_app, arguments)
    assert refused.exit_code == 2
    problem = json.loads(refused.stdout)["error"]
    assert "`model`: groups are of equal size: experts (64) must be a multiple of" in problem


def test_pages_print_what_the_plan_gives() -> None:
    rows = re.findall(
        r"`seodang foundation plan (.*?)` \| ([\d.]+) of 141 GB \| ([\d.]+) \|",
        (DOCS / "scaling.md").read_text(),
    )
    assert len(rows) == 3
    for options, memory, days in rows:
        found = plan_json(*options.split())
        engine = "fsdp2" if found["layout"]["pp"] == 1 else "megatron"
        planned = found["memory_per_device"][engine]["total_recomputed"]
        assert f"{planned / 1e9:.1f}" == memory
        assert f"{found['run']['days']:.1f}" == days
    page = (DOCS / "reference" / "foundation-plan.md").read_text()
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    printed, found = json.loads(block), plan_json("--preset", "a.x-k1")
    assert_same_shape(printed, found)
    assert (
        found["parameters"]["multi_token_prediction"]
        == (printed["parameters"]["multi_token_prediction"])
    )


def assert_same_shape(printed: dict[str, Any], found: dict[str, Any]) -> None:
    """Every key that is printed exists, and holds the number printed unless that is 0."""
    for key, value in printed.items():
        if isinstance(value, dict):
            assert_same_shape(value, found[key])
        elif value:
            assert found[key] == (pytest.approx(value, rel=0.01) if value == 0.389 else value)
        else:
            assert key in found


@pytest.mark.parametrize("name", list(PRESETS))
def test_tables_are_a_hundred_columns_wide_and_cite_what_they_use(name: str) -> None:
    result = CliRunner().invoke(foundation_app, ["plan", "--preset", name])
    assert result.exit_code == 0, result.output
    assert max(len(line) for line in result.stdout.splitlines()) <= 100
    assert "…" not in result.stdout
    for title in ("Parameters", "FLOPs of a token", "Memory of a device", "Assumed", "Sources"):
        assert title in result.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "name a recipe or one --preset"),
        (["--preset", "a.x"], "--preset a.x: there are"),
        (["--preset", "1b", "--set", "model.layers=2"], "--set changes a recipe"),
        (["--preset", "1b", "--device", "abacus"], "the known ones are"),
        (["--preset", "1b", "--sequence", "9000"], "context is 4,096"),
        (["--preset", "1b", "--utilisation", "0.4", "--tokens-per-second", "9"], "one of them"),
        (["--preset", "1b", "--layout", "tp=3", "--devices", "8"], "does not divide 8 devices"),
    ],
)
def test_command_refuses_what_makes_no_sense(arguments: list[str], problem: str) -> None:
    result = CliRunner().invoke(foundation_app, ["plan", *arguments])
    assert result.exit_code == 2
    assert problem in result.output
