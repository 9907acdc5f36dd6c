"""Packs: sequences side by side that do not see each other."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from seodang.recipe import SoftLabelsConfig, StudentConfig
from seodang.softlabels.capture import capture
from seodang.softlabels.store import SoftLabelStore
from seodang.student.distillation import Distillation
from seodang.student.packing import hidden_states, pack
from seodang.teacher.local import LocalTeacher
from seodang.training.attention import packed_attention, use_packed_attention
from tiny import tiny_teacher
from tiny_store import sequences


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def store(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "store"
    artifact = capture(LocalTeacher(teacher), sequences(12), SoftLabelsConfig(), out)
    return SoftLabelStore(artifact)


@pytest.fixture(scope="module")
def plain(teacher):
    """The teacher as transformers runs it: what packing is compared with."""
    return AutoModelForCausalLM.from_pretrained(teacher).eval()


@pytest.fixture(scope="module")
def packed(teacher):
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    use_packed_attention(model)
    return model


def distillation(model, objective="soft-labels", **changes):
    config = StudentConfig(cross_entropy_weight=0.3, **changes)
    return Distillation(model, config, objective, residual=False)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=6), st.randoms())
def test_the_loss_of_a_document_does_not_change_with_its_neighbours(store, packed, order, random):
    module = distillation(packed)
    with torch.no_grad():
        alone = [module(pack([store[i]])) for i in order]
        random.shuffle(order)
        together = module(pack([store[i] for i in order]))
    for name in ("total", "kd_loss", "cross_entropy"):
        expected = sum(float(getattr(terms, name)) for terms in alone)
        assert float(getattr(together, name)) == pytest.approx(expected, rel=1e-5)


def test_a_pack_has_the_loss_of_dense_float64_logits(store, plain, packed):
    """Catches labels shifted by one, sequences that see each other, positions that run on."""
    batch = [store[i] for i in (0, 3, 5)]
    terms = [float(term.detach()) for term in distillation(packed)(pack(batch))]
    kd, ce = 0.0, 0.0
    for sequence in batch:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
        log_q = torch.log_softmax(plain(ids).logits[0].detach().double(), -1)
        for t in sequence.labelled.tolist():
            part = slice(sequence.offsets[t], sequence.offsets[t + 1])
            w = torch.from_numpy(sequence.weights[part]).double()
            kd -= float((w * log_q[t, torch.from_numpy(sequence.ids[part]).long()]).sum())
            if t + 1 < len(sequence.token_ids):
                ce -= float(log_q[t, int(sequence.token_ids[t + 1])])
    assert terms == pytest.approx([kd + 0.3 * ce, kd, ce], rel=1e-5)
    alone = distillation(packed, "cross-entropy")(pack(batch, "cross-entropy"))
    assert float(alone.total.detach()) == pytest.approx(ce, rel=1e-5)


def test_another_neighbour_changes_no_hidden_state(store, packed):
    first, second, third = (store[i] for i in (1, 4, 7))
    with torch.no_grad():
        one = hidden_states(packed, pack([first, second]))
        other = hidden_states(packed, pack([first, third]))
    own = len(first.labelled)
    torch.testing.assert_close(one[:own], other[:own], rtol=0, atol=1e-6)


def test_gradients_of_a_pack_are_those_of_its_sequences(store, teacher):
    model = AutoModelForCausalLM.from_pretrained(teacher)
    use_packed_attention(model)
    module = distillation(model)
    batch = [store[i] for i in (2, 6, 9)]
    module(pack(batch)).total.backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for sequence in batch:
        module(pack([sequence])).total.backward()
    for expected, found in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(found, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_gradient_accumulates_as_autograd_has_it(store, tmp_path, tied):
    """In the forward pass, with the rows of a tied embedding, over two packs."""
    directory = tiny_teacher(tmp_path, tie_embeddings=tied)
    gradients = []
    for in_place in (False, True):
        model = AutoModelForCausalLM.from_pretrained(directory).train()
        use_packed_attention(model)
        module = distillation(model)
        if in_place:
            module.accumulate_head_gradient = True
            assert model.get_input_embeddings().sparse == tied
            for batch in ([0, 3], [5]):
                module(pack([store[i] for i in batch]), 0.25).total.backward()
        else:
            model.get_input_embeddings().sparse = False
            total = sum(module(pack([store[i] for i in b])).total for b in ([0, 3], [5]))
            (0.25 * total).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(store, teacher):
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(teacher).train()
        use_packed_attention(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        distillation(model)(pack([store[0], store[1]])).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_an_empty_pack_takes_part_with_nothing(packed):
    terms = distillation(packed)(pack([]))
    terms.total.backward()
    assert float(terms.total.detach()) == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in packed.parameters())


def test_positions_without_labels_cost_and_give_nothing(store, packed):
    sequence = store[3]
    some = sequence.labelled[::2]
    counts = np.diff(sequence.offsets)
    kept = np.zeros(len(counts), dtype=bool)
    kept[some] = True
    fewer = dataclasses.replace(
        sequence,
        labelled=some,
        offsets=np.concatenate([[0], np.cumsum(np.where(kept, counts, 0))]),
        ids=sequence.ids[np.repeat(kept, counts)],
        weights=sequence.weights[np.repeat(kept, counts)],
    )
    with torch.no_grad():
        assert hidden_states(packed, pack([fewer])).shape[0] == len(some)
        whole, part = (distillation(packed)(pack([s])) for s in (sequence, fewer))
    assert 0 < float(part.kd_loss) < float(whole.kd_loss)


def random_model(kind):
    torch.manual_seed(3)
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if kind == "axk1":
        from transformers import AXK1Config, AXK1ForCausalLM

        shape |= {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "eos_token_id": 1,
            "bos_token_id": 0,
            "pad_token_id": None,
        }
        return AXK1ForCausalLM(AXK1Config(**shape)).eval()
    if kind == "sliding":
        window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        return Qwen2ForCausalLM(Qwen2Config(**shape, **window)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


@pytest.mark.parametrize("kind", ["llama", "sliding", "axk1"])
def test_every_family_gives_what_it_gives_alone(kind):
    model = random_model(kind)
    lengths, generator = [7, 1, 12, 5], torch.Generator().manual_seed(0)
    parts = [torch.randint(0, 50, (n,), generator=generator) for n in lengths]
    with torch.no_grad():
        expected = torch.cat([model.base_model(p[None]).last_hidden_state[0] for p in parts])
        use_packed_attention(model)
        found = model.base_model(
            torch.cat(parts)[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            use_cache=False,
            document_lengths=lengths,
        ).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    heads=st.sampled_from([(2, 2), (6, 2)]),
    values=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**16),
)
@example(lengths=[1], heads=(6, 2), values=16, seed=1)
def test_bfloat16_attention_on_a_cpu_loses_no_more_than_its_rounding(lengths, heads, values, seed):
    """Scores and sums are float32 there, under autocast too: one rounding at the end."""
    draw = torch.Generator().manual_seed(seed)
    total, (of_query, of_key) = sum(lengths), heads
    shapes = ((of_query, 16), (of_key, 16), (of_key, values))
    given = [torch.randn(1, n, total, d, generator=draw).bfloat16() for n, d in shapes]
    half = [tensor.clone().requires_grad_() for tensor in given]
    exact = [tensor.double().requires_grad_() for tensor in given]
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_attention(None, *half, None, document_lengths=lengths)
    want, _ = packed_attention(None, *exact, None, document_lengths=lengths)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), want, rtol=2**-8, atol=1e-6)
    upstream = torch.randn(want.shape, generator=draw).bfloat16()
    found.backward(upstream)
    want.backward(upstream.double())
    for ours, theirs in zip(half, exact, strict=True):
        # Where a query sees one key its exact gradient is zero.
        atol = max(2**-7 * float(theirs.grad.abs().max()), 1e-6)
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2**-8, atol=atol)
