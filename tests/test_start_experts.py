"""Experts: which stay, what a merged one is, and which numbers are possible."""

import pytest
import torch

from seodang.recipe import SoftLabelsConfig, StudentConfig
from seodang.softlabels.store import SoftLabelStore
from seodang.student.experts import keep_experts, possible_experts
from seodang.student.start import build_start, choose_start
from tiny_families import save, tiny_model
from tiny_store import sequences, synthetic_store

EXPERTS = "model.layers.1.mlp.experts."
ROUTER = "model.layers.1.mlp.gate."


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "store"
    return SoftLabelStore(synthetic_store(out, SoftLabelsConfig(), sequences(12)))


def routed_weight(model, store):
    """The weight that each expert of layer 1 gets on the probe, by hand."""
    total = torch.zeros(8, dtype=torch.float64)

    def see(module, given, result):
        for weights, experts in zip(result[1], result[2], strict=True):
            for weight, expert in zip(weights.tolist(), experts.tolist(), strict=True):
                total[expert] += weight

    hook = model.model.layers[1].mlp.gate.register_forward_hook(see)
    with torch.inference_mode():
        for sequence in store:
            model(torch.tensor(sequence.token_ids.tolist())[None])
    hook.remove()
    return total


@pytest.mark.parametrize("how", ["drop", "merge"])
def test_the_most_used_experts_of_every_group_stay(store, tmp_path, how):
    model = tiny_model("axk1")
    directory = save(model, tmp_path / "m")
    config = StudentConfig(experts=4, reduce_experts=how)
    choice = choose_start(directory, store, config)
    use = routed_weight(model, store)
    best = [sorted((use[g : g + 4].argsort(descending=True)[:2] + g).tolist()) for g in (0, 4)]
    assert choice["kept_experts"][1] == best[0] + best[1]
    before, after = model.state_dict(), build_start(directory, config, choice).state_dict()
    if how == "drop":
        for name in (f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj", f"{ROUTER}weight"):
            assert torch.equal(after[name], before[name][best[0] + best[1]])
        return
    plan = choice["merged_experts"][1]
    assert sorted(int(member) for group in plan for member, _ in group) == list(range(8))
    assert [group[0][0] for group in plan] == best[0] + best[1]
    for row, group in enumerate(plan):
        members, shares = zip(*group, strict=True)
        assert sum(shares) == pytest.approx(1)
        used = use[list(members)] / use[list(members)].sum()
        assert list(shares) == pytest.approx(used.tolist(), rel=1e-5)
        expected = sum(s * before[f"{ROUTER}weight"][m] for m, s in group)
        torch.testing.assert_close(after[f"{ROUTER}weight"][row], expected)


def test_an_expert_merged_with_itself_in_another_order_is_itself():
    """Neurons have no order: they are matched before they are averaged."""
    state = tiny_model("axk1").state_dict()
    gate_up, down = state[f"{EXPERTS}gate_up_proj"], state[f"{EXPERTS}down_proj"]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    gate, up = gate_up[2].clone().chunk(2)
    gate_up[6] = torch.cat([gate[order], up[order]])
    down[6] = down[2][:, order]
    plan = [[[0, 1.0]], [[2, 0.3], [6, 0.7]], [[4, 1.0]], [[7, 1.0]]]
    choice = {"kept_experts": [None, [0, 2, 4, 7]], "merged_experts": [None, plan]}
    out = keep_experts(state, choice)
    torch.testing.assert_close(out[f"{EXPERTS}gate_up_proj"], gate_up[[0, 2, 4, 7]])
    torch.testing.assert_close(out[f"{EXPERTS}down_proj"], down[[0, 2, 4, 7]])


def test_experts_are_merged_with_those_that_the_router_treats_alike(store, tmp_path):
    model = tiny_model("axk1")
    router = model.model.layers[2].mlp.gate.weight.data
    model.model.layers[2].mlp.gate.e_score_correction_bias[:] = 0
    model.model.layers[2].mlp.gate.e_score_correction_bias[[1, 2, 5, 6]] = 1.0
    for dropped, alike in ((0, 5), (3, 1), (4, 6), (7, 2)):
        router[dropped] = 0.9 * router[alike]
    config = StudentConfig(experts=4, reduce_experts="merge")
    plan = choose_start(save(model, tmp_path / "m"), store, config)["merged_experts"][2]
    members = [[int(member) for member, _ in group] for group in plan]
    assert members == [[1, 3], [2, 7], [5, 0], [6, 4]]


def test_the_numbers_of_experts_that_are_possible():
    published = {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "n_routed_experts": 192}
    assert possible_experts(published) == list(range(16, 193, 8))
    assert possible_experts({**published, "topk_group": 2})[0] == 32
