"""Width and experts: what is left out must be exactly what was asked for, and nothing else."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from seodang.recipe import SoftLabelsConfig, StudentConfig
from seodang.softlabels.store import SoftLabelStore
from seodang.student.start import build_start, check_start, choose_start
from seodang.student.width import head_splits
from tiny_families import FAMILIES, logits, save, tiny_model
from tiny_store import sequences, synthetic_store

KEPT_HIDDEN = sorted(set(range(48)) - {1, 2, 7, 13, 14, 20, 21, 30, 31, 40, 46, 47})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "store"
    return SoftLabelStore(synthetic_store(out, SoftLabelsConfig(), sequences(12)))


@pytest.fixture(params=[*FAMILIES, "qwen3 tied", "llama tied"])
def model(request):
    family, *tied = request.param.split()
    return tiny_model(family, tied=bool(tied))


def started(directory, store, **shape):
    config = StudentConfig(**shape)
    check_start(directory, config)
    choice = json.loads(json.dumps(choose_start(directory, store, config)))
    return build_start(directory, config, choice), choice


def assert_same(found, expected, tolerance=1e-4):
    torch.testing.assert_close(logits(found), logits(expected), rtol=tolerance, atol=tolerance)


def zero_hidden(model, gone):
    """Let nothing write to these dimensions of the residual stream."""
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith(("embed_tokens.weight", "experts.down_proj")):
            value[:, gone] = 0
        elif any(part in name for part in ("post_mlp_layernorm", "o_proj.", "down_proj.")):
            value[gone] = 0


def test_everything_kept_is_the_model_itself(model, store, tmp_path):
    directory = save(model, tmp_path / "m")
    shape = {"hidden_size": 48, "intermediate_size": 40, "heads": 6, "layers": 4}
    if model.config.model_type == "axk1":
        shape["experts"] = 8
    found, choice = started(directory, store, **shape)
    assert choice["kept_hidden"] == list(range(48))
    assert choice["kept_heads"] == [list(range(6))] * 4
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=0)


def test_hidden_dimensions_that_are_zero_can_go(model, store, tmp_path):
    gone = sorted(set(range(48)) - set(KEPT_HIDDEN))
    zero_hidden(model, gone)
    found, choice = started(save(model, tmp_path / "m"), store, hidden_size=36)
    assert choice["kept_hidden"] == KEPT_HIDDEN
    assert found.config.hidden_size == 36
    assert_same(found, model)


def test_neurons_that_are_zero_can_go(model, store, tmp_path):
    kept = {}
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "up_proj"):
            alive = torch.randperm(40, generator=torch.Generator().manual_seed(index))[:25]
            dead = [i for i in range(40) if i not in alive]
            for value in layer.mlp.up_proj.state_dict().values():
                value[dead] = 0
            kept[index] = sorted(alive.tolist())
    found, choice = started(save(model, tmp_path / "m"), store, intermediate_size=25)
    assert choice["kept_neurons"] == [kept.get(i) for i in range(4)]
    assert_same(found, model)
    assert found.model.layers[0].mlp.up_proj.weight.shape == (25, 48)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_groups_whose_values_are_zero_can_go(family, store, tmp_path):
    model = tiny_model(family)
    size = model.config.head_dim if family != "qwen2" else 8
    for index, layer in enumerate(model.model.layers):
        dead = index % 3
        for value in layer.self_attn.v_proj.state_dict().values():
            value[dead * size : (dead + 1) * size] = 0
    found, choice = started(save(model, tmp_path / "m"), store, heads=4)
    assert choice["kept_heads"][:2] == [[2, 3, 4, 5], [0, 1, 4, 5]]
    assert (found.config.num_attention_heads, found.config.num_key_value_heads) == (4, 2)
    assert_same(found, model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [[[1, 2, 4], [0, 3, 5], [1, 3, 5], [0, 2, 4]], [[2, 3]] * 4])
def test_heads_that_nothing_reads_can_go(family, kept, tmp_path):
    model = tiny_model(family)
    for heads, layer in zip(kept, model.model.layers, strict=True):
        weight = layer.self_attn.o_proj.weight.data
        for head in set(range(6)) - set(heads):
            weight.view(48, 6, -1)[:, head] = 0
    directory, config = save(model, tmp_path / "m"), StudentConfig(heads=len(kept[0]))
    check_start(directory, config)
    choice = {"start": "pruned", "kept_layers": list(range(4)), "kept_heads": kept}
    found = build_start(directory, config, choice)
    assert_same(found, model)


def test_heads_of_latent_attention_that_are_zero_can_go(store, tmp_path):
    model = tiny_model("axk1")
    for index, layer in enumerate(model.model.layers):
        dead = [index, 5]
        layer.self_attn.kv_b_proj.weight.data.view(6, 22, -1)[dead, 12:] = 0
    found, choice = started(save(model, tmp_path / "m"), store, heads=4)
    assert choice["kept_heads"] == [[h for h in range(5) if h != i] for i in range(4)]
    assert_same(found, model)


@pytest.mark.parametrize("how", ["drop", "merge"])
def test_experts_that_are_never_chosen_can_go(store, tmp_path, how):
    model = tiny_model("axk1")
    kept = [[0, 3, 4, 6], [1, 2, 5, 7], [0, 1, 6, 7]]
    for experts, layer in zip(kept, model.model.layers[1:], strict=True):
        dead = [e for e in range(8) if e not in experts]
        layer.mlp.gate.e_score_correction_bias[dead] = -1e3
    found, choice = started(save(model, tmp_path / "m"), store, experts=4, reduce_experts=how)
    assert choice["kept_experts"] == [None, *kept]
    assert ("merged_experts" in choice) == (how == "merge")
    assert found.config.n_routed_experts == 4
    assert_same(found, model)


SMALLER = {
    "layers": 3,
    "hidden_size": 36,
    "intermediate_size": 24,
    "heads": 4,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_model_can_be_saved_loaded_and_trained(family, store, tmp_path):
    shape = {**SMALLER, **({"experts": 4, "reduce_experts": "merge"} if family == "axk1" else {})}
    directory = save(tiny_model(family), tmp_path / "m")
    found, choice = started(directory, store, **shape)
    again, same = started(directory, store, **shape)
    assert choice == same
    for name, value in found.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    found.save_pretrained(tmp_path / "s")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "s", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(loaded.eval(), found, 1e-6)
    settings = json.loads((tmp_path / "s" / "config.json").read_text())
    before = json.loads((directory / "config.json").read_text())
    assert settings["head_dim"] == before.get("head_dim", 8)  # the engine's files need it too
    assert settings["num_attention_heads"] == 4
    found.train()(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    for name, parameter in found.named_parameters():
        if "experts" not in name and "mlp.gate" not in name:  # not every expert is used
            assert parameter.grad.abs().sum() > 0, name


def test_what_is_left_out_is_chosen_on_the_layers_that_stay(store, tmp_path):
    """Width is measured after depth: a student of the same layers gets the same heads."""
    model = tiny_model("llama")
    directory = save(model, tmp_path / "m")
    _, choice = started(directory, store, layers=2, heads=2)
    two = StudentConfig(layers=2)
    small = build_start(directory, two, {"start": "pruned", "kept_layers": choice["kept_layers"]})
    _, alone = started(save(small, tmp_path / "two"), store, heads=2)
    assert choice["kept_heads"] == alone["kept_heads"]


@given(st.integers(1, 8), st.integers(1, 8))
def test_every_split_of_heads_is_a_number_of_equal_groups(groups, each):
    config = {"num_attention_heads": groups * each, "num_key_value_heads": groups}
    splits = head_splits(config)
    for heads, (kept_groups, kept_each) in splits.items():
        assert heads == kept_groups * kept_each
        assert kept_groups <= groups
        whole = heads % each == 0
        assert (kept_each == each) == whole  # whole groups go where the number allows it
    assert splits[groups * each] == (groups, each)
    assert {g * e for g in range(1, groups + 1) for e in range(1, each + 1)} == set(splits)
