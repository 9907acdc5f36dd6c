"""Training: the loss of a batch, exact resumption, and what is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seodang.causal_lm import CausalLM, load_tokenizer, tokenizer_fingerprint
from seodang.corpus.sequences import observed_tokens
from seodang.errors import InputError, WorkFailed
from seodang.recipe import SoftLabelsConfig, StudentConfig
from seodang.softlabels.capture import capture
from seodang.softlabels.store import SoftLabelStore
from seodang.student import train as train_module
from seodang.student.batch import batch_loss
from seodang.student.initialise import choose_layers, depth_pruned, without_block
from seodang.student.train import plan_batches, schedule, train
from seodang.teacher.local import LocalTeacher
from tiny import tiny_teacher
from tiny_store import sequences

CONFIG = StudentConfig(layers=2, epochs=2, batch_tokens=96, learning_rate=3e-3, checkpoint_steps=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def store(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "store"
    artifact = capture(LocalTeacher(teacher), sequences(16), SoftLabelsConfig(), out)
    return SoftLabelStore(artifact)


@pytest.fixture(scope="module")
def undisturbed(teacher, store, tmp_path_factory):
    return train(store, teacher, CONFIG, tmp_path_factory.mktemp("student") / "s")


def test_the_batch_loss_is_that_of_each_position_alone(teacher, store):
    """Against dense float64 logits of unpadded sequences: catches shifts and padding leaks."""
    model = depth_pruned(teacher, [0, 3])
    batch = [store[i] for i in (0, 3, 5)]
    terms = [term.detach() for term in batch_loss(model, batch, "soft-labels", 0.3)]
    kd, ce, positions = 0.0, 0.0, 0
    for sequence in batch:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
        log_q = torch.log_softmax(model(ids).logits[0].detach().double(), -1)
        for t in sequence.labelled.tolist():
            positions += 1
            part = slice(sequence.offsets[t], sequence.offsets[t + 1])
            w = torch.from_numpy(sequence.weights[part]).double()
            kd -= float((w * log_q[t, torch.from_numpy(sequence.ids[part]).long()]).sum())
            if t + 1 < len(sequence.token_ids):
                ce -= float(log_q[t, int(sequence.token_ids[t + 1])])
    assert float(terms[1]) == pytest.approx(kd / positions, rel=1e-5)
    assert float(terms[2]) == pytest.approx(ce / positions, rel=1e-5)
    assert float(terms[0]) == pytest.approx((kd + 0.3 * ce) / positions, rel=1e-5)
    alone = batch_loss(model, batch, "cross-entropy", 0.3)
    assert float(alone.total.detach()) == pytest.approx(ce / positions, rel=1e-5)


@pytest.mark.parametrize("estimator", ["residual", "top-k"])
def test_residual_labels_are_trained_with_their_own_loss(teacher, tmp_path, monkeypatch, estimator):
    config = SoftLabelsConfig(estimator=estimator, k=4)
    artifact = capture(LocalTeacher(teacher), sequences(4), config, tmp_path / "store")
    used = []

    def watched(*arguments):
        used.append(arguments[4])
        return batch_loss(*arguments)

    monkeypatch.setattr(train_module, "batch_loss", watched)
    train(SoftLabelStore(artifact), teacher, CONFIG, tmp_path / "s")
    assert set(used) == {estimator == "residual"}


def test_training_moves_the_student_towards_the_teacher(store, undisturbed):
    log = [json.loads(line) for line in (undisturbed.path / "training.jsonl").open()]
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    assert np.mean([r["kd_loss"] for r in log[-4:]]) < np.mean([r["kd_loss"] for r in log[:4]])
    assert undisturbed.verify() == []


def test_the_student_loads_without_seodang(teacher, undisturbed):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(undisturbed.path)
    assert model.config.num_hidden_layers == 2
    same = tokenizer_fingerprint(load_tokenizer(teacher))
    assert tokenizer_fingerprint(load_tokenizer(undisturbed.path)) == same


@pytest.mark.parametrize("crash_after", [0, 1, 5, 8])
def test_a_crash_at_any_step_changes_nothing(
    teacher, store, undisturbed, tmp_path, monkeypatch, crash_after
):
    calls = 0

    def fails(*arguments):
        nonlocal calls
        calls += 1
        if calls > crash_after:
            raise RuntimeError("synthetic crash")
        return batch_loss(*arguments)

    monkeypatch.setattr(train_module, "batch_loss", fails)
    with pytest.raises(RuntimeError, match="synthetic"):
        train(store, teacher, CONFIG, tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()
    monkeypatch.setattr(train_module, "batch_loss", batch_loss)
    resumed = train(store, teacher, CONFIG, tmp_path / "s")
    for file in undisturbed.manifest.files:
        expected = (undisturbed.path / file.path).read_bytes()
        assert (resumed.path / file.path).read_bytes() == expected, file.path
    assert resumed.digest == undisturbed.digest


def test_ctrl_c_saves_the_step_in_hand(teacher, store, undisturbed, tmp_path, monkeypatch):
    import os
    import signal

    steps = 0

    def interrupts(*arguments):
        nonlocal steps
        steps += 1
        if steps == 3:  # between two checkpoints
            os.kill(os.getpid(), signal.SIGINT)
        return batch_loss(*arguments)

    monkeypatch.setattr(train_module, "batch_loss", interrupts)
    with pytest.raises(KeyboardInterrupt):
        train(store, teacher, CONFIG, tmp_path / "s")
    assert (tmp_path / "s" / "checkpoints" / "step-00000003").is_dir()
    monkeypatch.setattr(train_module, "batch_loss", batch_loss)
    assert train(store, teacher, CONFIG, tmp_path / "s").digest == undisturbed.digest


def test_a_loss_that_is_not_finite_names_the_documents(teacher, store, tmp_path):
    wild = CONFIG.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(WorkFailed, match=r"not finite.*doc\d"):
        train(store, teacher, wild, tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_labels_of_other_tokens_are_refused(teacher, store, tmp_path, monkeypatch):
    import dataclasses

    sequence = store[0]
    shifted = dataclasses.replace(sequence, token_ids=np.roll(sequence.token_ids, 1))
    monkeypatch.setattr(SoftLabelStore, "__getitem__", lambda self, index: shifted)
    with pytest.raises(InputError, match="digest"):
        train(store, teacher, CONFIG, tmp_path / "s")


def test_a_student_with_another_tokenizer_is_refused(store, tmp_path, teacher):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    text = (other / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="another tokenizer"):
        train(store, other, CONFIG, tmp_path / "s")


def test_more_layers_than_the_teacher_has_are_refused(teacher, store, undisturbed):
    with pytest.raises(InputError, match="has only 4"):
        train(store, teacher, CONFIG.model_copy(update={"layers": 5}), undisturbed.path)
    assert undisturbed.verify() == []  # what was finished is still there


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_the_layers_kept_are_those_that_lose_least(teacher, store, keep):
    kept = choose_layers(teacher, store, keep)
    assert kept == sorted(set(kept))
    assert len(kept) == keep
    assert kept[0] == 0

    def loss(layers):
        with torch.inference_mode():
            model = depth_pruned(teacher, layers)
            return float(batch_loss(model, list(store), "soft-labels", 0.0).distillation)

    others = [without_block(4, keep, start) for start in range(1, keep)]
    assert all(loss(kept) <= loss(other) + 0.05 for other in others)


def test_keeping_every_layer_is_the_teacher(teacher):
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = CausalLM.load(teacher).model(ids).logits
        found = depth_pruned(teacher, range(4))(ids).logits
    torch.testing.assert_close(found, expected)


@given(
    st.lists(st.integers(1, 80), max_size=60),
    st.integers(1, 300),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_batches_hold_every_sequence_once_an_epoch(lengths, batch_tokens, epochs, seed):
    batches = plan_batches(lengths, batch_tokens, epochs, seed)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == sorted(list(range(len(lengths))) * epochs)
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= batch_tokens or len(batch) == 1
    assert batches == plan_batches(lengths, batch_tokens, epochs, seed)


@given(st.integers(1, 500), st.floats(0, 0.9))
def test_the_schedule_rises_then_falls(steps, warmup):
    rates = [schedule(i, steps, warmup) for i in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_observed_tokens_are_the_next_ones(store):
    sequence = store[1]
    found = observed_tokens(sequence)
    for index, position in enumerate(sequence.labelled):
        last = position == len(sequence.token_ids) - 1
        assert found[index] == (-100 if last else sequence.token_ids[position + 1])
