"""Where a student starts: layers, random weights, other models, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from seodang.causal_lm import CausalLM
from seodang.errors import InputError
from seodang.recipe import SoftLabelsConfig, StudentConfig
from seodang.softlabels.capture import capture
from seodang.softlabels.store import SoftLabelStore
from seodang.student.depth import layer_settings, only_layers, without_block
from seodang.student.probe import probe_sequences, soft_label_loss
from seodang.student.start import build_start, check_start, choose_start, start_directory
from seodang.teacher.local import LocalTeacher
from tiny import tiny_teacher, tiny_tokenizer
from tiny_families import logits, save, tiny_model
from tiny_store import sequences


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def store(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "store"
    return SoftLabelStore(capture(LocalTeacher(teacher), sequences(16), SoftLabelsConfig(), out))


def pruned(directory, kept):
    config = StudentConfig(layers=len(kept))
    return build_start(directory, config, {"start": "pruned", "kept_layers": list(kept)})


def test_the_probe_loss_is_that_of_dense_logits(teacher, store):
    model = CausalLM.load(teacher).model
    total, positions = 0.0, 0
    for sequence in store:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            log_q = torch.log_softmax(model(ids).logits[0].double(), -1).numpy()
        for t in sequence.labelled.tolist():
            part = slice(sequence.offsets[t], sequence.offsets[t + 1])
            total -= float(sequence.weights[part] @ log_q[t, sequence.ids[part]])
            positions += 1
    found = float(soft_label_loss(model, list(store), residual=False).detach())
    assert found == pytest.approx(total / positions, rel=1e-5)


@pytest.mark.parametrize(
    ("keep", "estimator"),
    [(1, "head-tail"), (2, "head-tail"), (3, "head-tail"), (4, "head-tail"), (3, "residual")],
)
def test_the_layers_kept_are_those_missed_least(teacher, tmp_path, keep, estimator):
    config = SoftLabelsConfig(estimator=estimator)
    labels = SoftLabelStore(
        capture(LocalTeacher(teacher), sequences(12), config, tmp_path / "labels")
    )
    choice = choose_start(teacher, labels, StudentConfig(layers=keep))
    kept = choice["kept_layers"]
    assert kept == sorted(set(kept))
    assert len(kept) == keep
    assert kept[0] == 0

    def loss(layers):
        with torch.inference_mode():
            probe = probe_sequences(labels)
            model = pruned(teacher, layers)
            return float(soft_label_loss(model, probe, residual=estimator == "residual"))

    others = [without_block(4, keep, start) for start in range(1, keep)]
    assert all(loss(kept) <= loss(other) + 1e-5 for other in others)


def test_keeping_every_layer_is_the_teacher(teacher):
    expected = logits(CausalLM.load(teacher).model)
    assert torch.equal(logits(pruned(teacher, range(4))), expected)
    assert torch.equal(logits(build_start(teacher, StudentConfig(), NOTHING)), expected)


NOTHING = {"start": "pruned", "kept_layers": [0, 1, 2, 3]}


@pytest.mark.parametrize("family", ["qwen2", "axk1", "mistral"])
@pytest.mark.parametrize("kept", [[0, 3], [0, 1, 3], [0]])
def test_layers_that_add_nothing_can_go(tmp_path, family, kept):
    """Also where layers differ: Qwen2 has windows in some, A.X K1 experts in all but the first."""
    model = tiny_model(family)
    for index in set(range(4)) - set(kept):
        for name, value in model.model.layers[index].state_dict().items():
            if "o_proj" in name or "down_proj" in name or "post_mlp" in name:
                value.zero_()
    model.generation_config.max_new_tokens = 17
    directory = save(model, tmp_path / "m")
    check_start(directory, StudentConfig(layers=len(kept)))
    found = pruned(directory, kept)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    with only_layers(model, kept):
        torch.testing.assert_close(logits(model, use_cache=False), logits(found))
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert found.generation_config.max_new_tokens == 17
    found.save_pretrained(tmp_path / "s")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded), logits(found))


def test_lists_with_an_entry_for_each_layer_are_cut_alike():
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 2],
        "eos_token_id": [1, 2, 3],
    }
    assert layer_settings(config, [0, 2]) == {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "chunked_attention"],
        "no_rope_layers": [1, 2],
    }


def test_from_scratch_only_the_shape_and_the_seed_decide(teacher, store):
    config = StudentConfig(start="scratch", layers=2, hidden_size=32, heads=2, seed=3)
    check_start(teacher, config)
    choice = choose_start(teacher, store, config)
    assert choice == {"start": "scratch"}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two = (build_start(teacher, config, choice) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    other = build_start(teacher, config.model_copy(update={"seed": 4}), choice)
    assert torch.equal(logits(one), logits(two))
    assert not torch.equal(logits(one), logits(other))
    assert one.config.num_hidden_layers == 2
    assert one.get_output_embeddings().weight.shape == (600, 32)
    assert one.config.head_dim == 16
    assert one.generation_config.eos_token_id == tiny_tokenizer().eos_token_id


def test_a_model_with_the_same_tokenizer_is_taken_as_it_is(teacher, store, tmp_path):
    other = tiny_model("qwen3", seed=7)
    config = StudentConfig(path=str(save(other, tmp_path / "other")))
    assert start_directory(teacher, config) == tmp_path / "other"
    check_start(teacher, config)
    choice = choose_start(teacher, store, config)
    assert torch.equal(logits(build_start(teacher, config, choice)), logits(other))
    narrow = config.model_copy(update={"hidden_size": 24, "layers": 2})
    check_start(teacher, narrow)
    found = build_start(teacher, narrow, choose_start(teacher, store, narrow))
    assert found.config.model_type == "qwen3"
    assert logits(found).shape == (40, 600)


@pytest.mark.parametrize("outputs", [600, 605, 640])
@pytest.mark.parametrize("tied", [True, False])
def test_the_student_has_as_many_outputs_as_the_teacher(teacher, store, tmp_path, outputs, tied):
    """Beyond the tokenizer's ids models are padded, each as it likes."""
    padded = save(tiny_model("qwen3", vocab_size=620), tmp_path / "teacher")
    other = tiny_model("llama", vocab_size=outputs, tied=tied)
    other.generation_config.max_new_tokens = 17
    config = StudentConfig(path=str(save(other, tmp_path / "other")), layers=4)
    check_start(padded, config)
    found = build_start(padded, config, choose_start(padded, store, config))
    assert found.config.vocab_size == 620
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    common = min(outputs, 620)
    assert torch.equal(logits(found)[:, :common], logits(other)[:, :common])
    for part in (found.get_input_embeddings(), found.get_output_embeddings()):
        new = part.weight[outputs:]
        torch.testing.assert_close(new, part.weight[:common].mean(0).expand_as(new))
    assert logits(found).isfinite().all()
    scratch = config.model_copy(update={"start": "scratch"})
    check_start(padded, scratch)
    random = build_start(padded, scratch, {"start": "scratch"})
    assert logits(random).shape == (40, 620)
    assert random.generation_config.max_new_tokens == 17


def edited(teacher, out, change):
    """A copy of the teacher whose tokenizer.json is changed."""
    shutil.copytree(teacher, out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    change(tokenizer)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    return StudentConfig(path=str(out))


def swap(tokenizer):
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def shorten(tokenizer):
    model = tokenizer["model"]
    last = max(model["vocab"], key=model["vocab"].get)
    del model["vocab"][last]
    model["merges"] = [m for m in model["merges"] if "".join(m) != last]


def reorder(tokenizer):
    tokenizer["model"]["merges"].reverse()


def prefix(tokenizer):
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap, r"id 598 is '.*', the teacher's is '.*'.*capture them.*start from the teacher"),
        (shorten, r"it has 599 tokens, the teacher's 600; id 599 is nothing, the teacher's is '"),
        (reorder, r"cuts text in another way: other merges.*Save the teacher's tokenizer"),
        (prefix, r"cuts text in another way: other pre-tokenizer"),
    ],
)
def test_another_tokenizer_is_refused_with_the_reason_and_the_way_out(
    teacher, tmp_path, change, says
):
    with pytest.raises(InputError, match=says):
        check_start(teacher, edited(teacher, tmp_path / "m", change))


def test_a_tokenizer_that_is_read_in_another_way_is_refused(teacher, tmp_path):
    """Beside a Qwen2 configuration transformers puts another pre-tokenizer into the same file."""
    config = StudentConfig(path=str(save(tiny_model("qwen2"), tmp_path / "m")))
    with pytest.raises(InputError, match=r"tokenizer.json is the teacher's, but.*another way"):
        check_start(teacher, config)


def test_another_chat_template_is_only_said_aloud(teacher, store, tmp_path, capsys):
    config = edited(teacher, tmp_path / "m", lambda tokenizer: None)
    check_start(teacher, config)
    assert capsys.readouterr().err == ""
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    check_start(teacher, config)
    assert "its chat template is not the teacher's" in capsys.readouterr().err


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    out = tmp_path_factory.mktemp("models")
    for family in ("llama", "qwen3", "axk1"):
        save(tiny_model(family), out / family)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(out / "gpt2")
    shape = {"model_type": "gpt2", "vocab_size": 600, "n_embd": 24, "n_layer": 3, "n_head": 2}
    (out / "gpt2" / "config.json").write_text(json.dumps(shape))
    (out / "gpt2" / "model.safetensors").write_bytes(b"")
    (out / "bare").mkdir()
    shutil.copytree(out / "gpt2", out / "unknown")
    (out / "unknown" / "config.json").write_text('{"model_type": "brand-new"}')
    shutil.copytree(out / "llama", out / "weightless")
    (out / "weightless" / "model.safetensors").unlink()
    return out


@pytest.mark.parametrize(
    ("model", "shape", "says"),
    [
        ("llama", {"layers": 5}, r"student.layers is 5, .* has only 4"),
        ("qwen3", {"hidden_size": 49}, r"student.hidden_size is 49, .* has only 48"),
        ("qwen3", {"intermediate_size": 41}, r"student.intermediate_size is 41, .* only 40"),
        ("qwen3", {"heads": 7}, r"student.heads is 7, .* has only 6"),
        ("qwen3", {"heads": 5}, r"student.heads is 5.* 3 groups.*nearest possible: 4 or 6"),
        ("llama", {"heads": 5}, r"student.heads is 5.*nearest possible: 4 or 6"),
        ("llama", {"hidden_size": 44}, r"student.hidden_size is 44.*6 heads.*: 42 or 48"),
        ("llama", {"hidden_size": 22, "heads": 4}, r"hidden_size is 22.*4 heads.*: 20 or 24"),
        ("axk1", {"experts": 9}, r"student.experts is 9, .* has only 8"),
        ("axk1", {"experts": 5}, r"student.experts is 5.*2 groups.*nearest possible: 4 or 6"),
        ("axk1", {"experts": 2}, r"student.experts is 2.*nearest possible: 4"),
        ("qwen3", {"experts": 2}, r"student.experts: .*qwen3.*only those of axk1"),
        ("axk1", {"reduce_experts": "merge"}, r"student.reduce_experts: merge needs"),
        ("gpt2", {"heads": 1}, r"student.heads: .*gpt2.*llama, qwen2, qwen3, axk1.*layers works"),
        ("gpt2", {"layers": 2}, r"student.layers: .*gpt2 model do not stand in `layers`"),
        ("unknown", {}, r"student.path .*unknown: config.json cannot be used: .*brand-new"),
        ("bare", {}, r"student.path .*bare: no config.json"),
        ("weightless", {}, r"student.path .*weightless: no weights.*student.start: scratch"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_its_key(models, teacher, model, shape, says):
    config = StudentConfig(path=str(models / model), **shape)
    with pytest.raises(InputError, match=says):
        check_start(teacher, config)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("llama", {"hidden_size": 24, "heads": 4}),
        ("qwen3", {"hidden_size": 41, "heads": 3}),
        ("axk1", {"experts": 6, "heads": 5, "reduce_experts": "merge"}),
        ("weightless", {"start": "scratch"}),
        ("llama", {"start": "embeddings", "layers": 1}),
        ("gpt2", {}),
    ],
)
def test_a_shape_that_can_be_is_not(models, teacher, model, shape):
    check_start(teacher, StudentConfig(path=str(models / model), **shape))


def test_an_a_x_k1_teacher_has_a_dense_llama_as_student(models):
    config = StudentConfig(start="scratch", architecture="llama", layers=2, heads=4)
    check_start(models / "axk1", config)
    student = build_start(models / "axk1", config, {"start": "scratch"})
    assert student.config.model_type == "llama"
    assert student.config.num_hidden_layers == 2
    assert student.config.hidden_size == 48  # the teacher's, as nothing else is said
    assert logits(student).shape[-1] == 600
    larger = config.model_copy(update={"hidden_size": 96, "intermediate_size": 200})
    check_start(models / "axk1", larger)
    with pytest.raises(InputError, match=r"student.heads is 5.*48 dimensions.*4 or 6"):
        check_start(models / "axk1", config.model_copy(update={"heads": 5}))


def test_random_layers_of_another_architecture_may_stand_on_the_teachers_embeddings(models):
    teacher = models / "axk1"
    config = StudentConfig(start="embeddings", architecture="llama", layers=2, heads=4)
    check_start(teacher, config)
    choice = choose_start(teacher, None, config)
    assert choice == {"start": "embeddings"}
    student = build_start(teacher, config, choice)
    known = CausalLM.load(teacher).model.get_input_embeddings().weight
    assert student.config.model_type == "llama"
    assert torch.equal(student.get_input_embeddings().weight, known)
    assert not torch.equal(
        student.get_input_embeddings().weight,
        build_start(teacher, config, {"start": "scratch"}).get_input_embeddings().weight,
    )
    with pytest.raises(InputError, match=r"student.hidden_size is 96.*embeddings.*width, 48"):
        check_start(teacher, config.model_copy(update={"hidden_size": 96}))


def test_an_output_head_of_its_own_is_taken_over_too(tmp_path, teacher):
    directory = save(tiny_model("llama", tie_word_embeddings=False), tmp_path / "m")
    config = StudentConfig(start="embeddings", path=str(directory), layers=1)
    check_start(teacher, config)
    student = build_start(teacher, config, {"start": "embeddings"})
    model = CausalLM.load(directory).model
    assert torch.equal(student.lm_head.weight[:600], model.lm_head.weight[:600])
    assert not torch.equal(student.lm_head.weight, student.model.embed_tokens.weight)
    for name, weight in student.model.layers[0].mlp.named_parameters():
        assert not torch.equal(weight, model.model.layers[0].mlp.get_parameter(name))


@pytest.mark.parametrize("other", [{"start": "pruned"}, {"path": "m"}, {"experts": 4}])
def test_another_architecture_has_no_weights_to_start_from(other):
    with pytest.raises(ValueError, match="`architecture` is for random layers"):
        StudentConfig(**{"start": "scratch", "architecture": "llama", **other})


def test_the_heads_of_a_llama_must_divide_its_width(tmp_path, teacher):
    config = StudentConfig(path=str(save(tiny_model("llama", hidden_size=54), tmp_path / "m")))
    with pytest.raises(InputError, match=r"student.heads is 4: the width of a Llama \(54\)"):
        check_start(teacher, config.model_copy(update={"heads": 4}))
    check_start(teacher, config.model_copy(update={"heads": 3}))
    check_start(teacher, config.model_copy(update={"heads": 4, "hidden_size": 52}))


def test_what_llama_cpp_cannot_load_is_said_before_the_work(tmp_path, capsys):
    """Its Qwen2 takes the width for heads times size; PyTorch and the other families do not."""
    directory = save(tiny_model("qwen2"), tmp_path / "m")
    for shape in ({}, {"hidden_size": 32, "heads": 4}, {"intermediate_size": 20}):
        check_start(directory, StudentConfig(**shape))
        assert capsys.readouterr().err == ""
    check_start(directory, StudentConfig(heads=4))
    assert "for a GGUF file set student.hidden_size to 32" in capsys.readouterr().err
