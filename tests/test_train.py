"""Training: the plan, the schedule, exact resumption, and what is refused."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seodang.artifact import Source
from seodang.causal_lm import CausalLM, load_tokenizer, tokenizer_fingerprint
from seodang.corpus.sequences import observed_tokens
from seodang.errors import InputError, WorkFailed
from seodang.recipe import SoftLabelsConfig, StudentConfig
from seodang.softlabels.capture import capture
from seodang.softlabels.store import SoftLabelStore
from seodang.student.distillation import Distillation
from seodang.student.train import train, untrained
from seodang.teacher.local import LocalTeacher
from seodang.training import checkpoint
from seodang.training.attention import use_packed_attention
from seodang.training.log import EVENTS, LOG, SPEED, read_rows
from seodang.training.loop import schedule
from seodang.training.parallel import Processes
from seodang.training.plan import plan_steps, share
from tiny import tiny_teacher
from tiny_store import sequences

CONFIG = StudentConfig(layers=2, epochs=2, batch_tokens=96, learning_rate=3e-3, checkpoint_steps=4)
ALONE = Processes(0, 1, torch.device("cpu"))


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


def changed(**keys):
    return CONFIG.model_copy(update=keys)


def calls_before(monkeypatch, happening):
    """Call ``happening(number)`` before the loss of every pack."""
    forward, number = Distillation.forward, 0

    def watched(self, batch, scale):
        nonlocal number
        number += 1
        happening(number)
        return forward(self, batch, scale)

    monkeypatch.setattr(Distillation, "forward", watched)


@pytest.mark.parametrize("estimator", ["residual", "top-k"])
def test_residual_labels_are_trained_with_their_own_loss(teacher, tmp_path, monkeypatch, estimator):
    config = SoftLabelsConfig(estimator=estimator, k=4)
    artifact = capture(LocalTeacher(teacher), sequences(4), config, tmp_path / "store")
    used = []
    forward = Distillation.forward

    def watched(self, batch, scale):
        used.append(self.residual)
        return forward(self, batch, scale)

    monkeypatch.setattr(Distillation, "forward", watched)
    train(SoftLabelStore(artifact), teacher, CONFIG, tmp_path / "s")
    assert set(used) == {estimator == "residual"}


def test_training_moves_the_student_towards_the_teacher(store, undisturbed):
    log = read_rows(undisturbed.path / LOG)
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    assert np.mean([r["kd_loss"] for r in log[-4:]]) < np.mean([r["kd_loss"] for r in log[:4]])
    assert sum(row["tokens"] for row in log) == 2 * store.lengths.sum()
    assert sum(row["labelled"] for row in log) == 2 * store.num_tokens
    assert undisturbed.verify() == []


def test_tensorboard_reads_what_the_log_says(undisturbed):
    """The file is read as TensorBoard does: length, checksums and an event, again and again."""
    import struct

    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data):
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    data, events = (undisturbed.path / EVENTS).read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(body)
        events.append(Event.FromString(body))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    rows = read_rows(undisturbed.path / LOG)
    shown = [{v.tag: v.simple_value for v in e.summary.value} for e in events[1:]]
    assert [event.step for event in events[1:]] == [row["step"] for row in rows]
    for row, figures in zip(rows, shown, strict=True):
        assert figures["loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert figures["tokens_per_second"] > 0


def test_the_student_loads_without_seodang(teacher, undisturbed):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(undisturbed.path)
    assert model.config.num_hidden_layers == 2
    assert model.config._attn_implementation == "sdpa"
    same = tokenizer_fingerprint(load_tokenizer(teacher))
    assert tokenizer_fingerprint(load_tokenizer(undisturbed.path)) == same


@pytest.mark.parametrize("crash_before", [1, 2, 6, 9])
def test_a_crash_at_any_step_changes_nothing(
    teacher, store, undisturbed, tmp_path, monkeypatch, crash_before
):
    def fails(number):
        if number == crash_before:
            raise RuntimeError("synthetic crash")

    with monkeypatch.context() as patch:
        calls_before(patch, fails)
        with pytest.raises(RuntimeError, match="synthetic"):
            train(store, teacher, CONFIG, tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()
    resumed = train(store, teacher, CONFIG, tmp_path / "s")
    for file in undisturbed.manifest.files:
        if file.reproducible:
            expected = (undisturbed.path / file.path).read_bytes()
            assert (resumed.path / file.path).read_bytes() == expected, file.path
    assert resumed.digest == undisturbed.digest
    assert len(read_rows(resumed.path / SPEED)) == len(read_rows(resumed.path / LOG))


def test_ctrl_c_saves_the_step_in_hand(teacher, store, undisturbed, tmp_path, monkeypatch):
    def interrupts(number):
        if number == 3:  # between two checkpoints
            for _ in range(2):  # the second one comes from torchrun
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)

    with monkeypatch.context() as patch:
        calls_before(patch, interrupts)
        with pytest.raises(KeyboardInterrupt):
            train(store, teacher, CONFIG, tmp_path / "s")
    assert (tmp_path / "s" / "checkpoints" / "step-00000003").is_dir()
    assert train(store, teacher, CONFIG, tmp_path / "s").digest == undisturbed.digest


def test_a_later_ctrl_c_ends_the_step_in_hand(teacher, store, tmp_path, monkeypatch):
    def interrupts(number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGINT)

    calls_before(monkeypatch, interrupts)
    with pytest.raises(KeyboardInterrupt):
        train(store, teacher, CONFIG, tmp_path / "s")
    assert not list((tmp_path / "s").glob("checkpoints/step-*"))


def test_checkpoints_hold_weights_moments_and_nothing_to_unpickle(store, teacher, tmp_path):
    def saved(config):
        model = untrained_model(teacher)
        module = Distillation(model, config, "soft-labels", False)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        sum((p**2).sum() for p in module.parameters()).backward()
        optimizer.step()
        return module, optimizer

    module, optimizer = saved(CONFIG)
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, module, [optimizer], ALONE, keep=3)
    assert [p.name for p in checkpoint.found(tmp_path)] == [f"step-0000000{i}" for i in (3, 4, 5)]
    names = {p.name for p in (tmp_path / "step-00000005").iterdir()}
    assert all(name.endswith((".safetensors", ".json")) for name in names)
    fresh = Distillation(untrained_model(teacher), CONFIG, "soft-labels", False)
    other = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    assert checkpoint.load(tmp_path, fresh, [other], ALONE) == 5
    for p, q in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key], other.state[q][key])
        assert float(other.state[q]["step"]) == 5


def untrained_model(teacher):
    model = CausalLM.load(teacher).model
    use_packed_attention(model)
    return model


def test_a_checkpoint_that_was_being_written_is_passed_over(store, teacher, tmp_path):
    module = Distillation(untrained_model(teacher), CONFIG, "soft-labels", False)
    optimizer = torch.optim.AdamW(module.parameters())
    sum((p**2).sum() for p in module.parameters()).backward()
    optimizer.step()
    checkpoint.save(tmp_path, 2, module, [optimizer], ALONE)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "state.json").write_text('{"step": 3}')
    assert checkpoint.load(tmp_path, module, [optimizer], ALONE) == 2


@pytest.mark.parametrize("pack_tokens", [17, 40, 64, None])
def test_gradient_accumulation_equals_the_large_batch(
    teacher, store, undisturbed, tmp_path, monkeypatch, pack_tokens
):
    packs = []
    calls_before(monkeypatch, packs.append)
    monkeypatch.setattr(
        "seodang.student.distillation.CPU_PACK_TOKENS", 48
    )  # what None means on a CPU
    small = train(store, teacher, changed(micro_batch_tokens=pack_tokens), tmp_path / "s")
    assert len(packs) > 1.2 * len(read_rows(small.path / LOG))
    for row, expected in zip(
        read_rows(small.path / LOG), read_rows(undisturbed.path / LOG), strict=True
    ):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)


def test_bfloat16_follows_float32(teacher, store, undisturbed, tmp_path):
    half = train(store, teacher, changed(precision="bfloat16"), tmp_path / "s")
    losses, expected = (
        np.array([row["loss"] for row in read_rows(artifact.path / LOG)])
        for artifact in (half, undisturbed)
    )
    assert not np.array_equal(losses, expected)  # it was used
    np.testing.assert_allclose(losses, expected, rtol=0.03)
    assert CausalLM.load(half.path).model.dtype == torch.float32


def test_gradient_checkpointing_gives_the_same_student(teacher, store, undisturbed, tmp_path):
    other = train(store, teacher, changed(gradient_checkpointing=True), tmp_path / "s")
    for row, expected in zip(
        read_rows(other.path / LOG), read_rows(undisturbed.path / LOG), strict=True
    ):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_the_baseline_starts_where_the_student_did(teacher, store, undisturbed, tmp_path):
    baseline = train(
        store,
        teacher,
        CONFIG,
        tmp_path / "b",
        objective="cross-entropy",
        same_start_as=undisturbed,
    )
    one, other = (untrained(a.path, teacher, CONFIG) for a in (undisturbed, baseline))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all(row["kd_loss"] == 0 for row in read_rows(baseline.path / LOG))


def test_a_student_can_be_trained_on(teacher, store, undisturbed, tmp_path):
    further = train(
        store, teacher, changed(learning_rate=1e-4), tmp_path / "f", continue_from=undisturbed
    )
    first = read_rows(further.path / LOG)[0]
    assert first["kd_loss"] < read_rows(undisturbed.path / LOG)[0]["kd_loss"]
    assert further.manifest.inputs["continue_from"] == undisturbed.digest


def test_a_student_names_what_its_start_was_made_of(teacher, store, undisturbed, tmp_path):
    known = Source(name="help", license="MIT")
    first = train(store, teacher, CONFIG, tmp_path / "first", sources=[known])
    config = StudentConfig(path=str(first.path), epochs=1, batch_tokens=96)
    labels = Source(name="pages", license="CC0-1.0")
    second = train(store, teacher, config, tmp_path / "second", sources=[labels])
    assert second.manifest.sources == [labels, known]
    again = train(store, teacher, config, tmp_path / "third", sources=[known])
    assert again.manifest.sources == [known]
    bare = tmp_path / "bare"
    shutil.copytree(teacher, bare)
    (bare / "manifest.json").unlink(missing_ok=True)
    config = config.model_copy(update={"path": str(bare)})
    (unknown,) = train(store, teacher, config, tmp_path / "fourth").manifest.sources
    assert (unknown.name, unknown.license) == ("bare", "not stated")


@pytest.mark.parametrize("divergence", ["reverse-kl", "jsd"])
def test_other_divergences_need_probabilities_and_fall(teacher, store, tmp_path, divergence):
    with pytest.raises(InputError, match=r"set soft_labels\.estimator to residual"):
        train(store, teacher, changed(divergence=divergence), tmp_path / "refused")
    config = SoftLabelsConfig(estimator="residual", k=8)
    labels = capture(LocalTeacher(teacher), sequences(16), config, tmp_path / "store")
    config = changed(divergence=divergence, cross_entropy_weight=0.0, epochs=4)
    student = train(SoftLabelStore(labels), teacher, config, tmp_path / "s")
    losses = [row["kd_loss"] for row in read_rows(student.path / LOG)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_a_loss_that_is_not_finite_names_the_documents(teacher, store, tmp_path):
    with pytest.raises(WorkFailed, match=r"not finite.*doc\d"):
        train(store, teacher, changed(learning_rate=1e30), tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_the_one_document_with_a_loss_that_is_not_finite_is_named(
    teacher, store, tmp_path, monkeypatch
):
    import dataclasses

    get, bad = SoftLabelStore.__getitem__, store[5].document_id
    assert bad != store[4].document_id

    def poisoned(self, index):
        sequence = get(self, index)
        if sequence.document_id != bad:
            return sequence
        return dataclasses.replace(sequence, weights=sequence.weights * np.float32(np.nan))

    monkeypatch.setattr(SoftLabelStore, "__getitem__", poisoned)
    with pytest.raises(WorkFailed) as caught:
        train(store, teacher, changed(batch_tokens=100_000), tmp_path / "s")
    assert f"documents: {bad}." in str(caught.value)


def test_labels_of_other_tokens_are_refused(teacher, store, tmp_path, monkeypatch):
    import dataclasses

    sequence = store[0]
    shifted = dataclasses.replace(sequence, token_ids=np.roll(sequence.token_ids, 1))
    monkeypatch.setattr(SoftLabelStore, "__getitem__", lambda self, index: shifted)
    with pytest.raises(InputError, match="digest"):
        train(store, teacher, CONFIG, tmp_path / "s")


def test_labels_of_another_tokenizer_are_refused(store, tmp_path, teacher):
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


def test_an_impossible_start_leaves_what_was_finished(teacher, store, undisturbed):
    with pytest.raises(InputError, match="layers"):
        train(store, teacher, changed(layers=5), undisturbed.path)
    assert undisturbed.verify() == []


def test_keeping_every_layer_starts_as_the_teacher(teacher, store, tmp_path):
    config = changed(layers=None, learning_rate=1e-9, epochs=1)
    student = train(store, teacher, config, tmp_path / "s")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = CausalLM.load(teacher).model(ids).logits
        found = untrained(student.path, teacher, config)(ids).logits
    torch.testing.assert_close(found, expected)


LENGTHS = st.lists(st.integers(1, 80), max_size=60)


@given(LENGTHS, st.integers(1, 300), st.integers(1, 3), st.integers(0, 9))
def test_steps_hold_every_sequence_once_an_epoch(lengths, batch_tokens, epochs, seed):
    steps = plan_steps(lengths, batch_tokens, epochs, seed)
    flat = [i for step in steps for i in step]
    assert sorted(flat) == sorted(list(range(len(lengths))) * epochs)
    for step in steps:
        assert step
        assert sum(lengths[i] for i in step) <= batch_tokens or len(step) == 1
    assert steps == plan_steps(lengths, batch_tokens, epochs, seed)


@given(LENGTHS, st.integers(1, 5), st.none() | st.integers(1, 100))
def test_processes_share_a_step_without_loss_or_repetition(lengths, processes, pack_tokens):
    step = list(range(len(lengths)))
    shared = share(step, lengths, processes, pack_tokens)
    assert len(shared) == processes
    assert len({len(packs) for packs in shared}) == 1  # collectives: all do the same number
    members = [i for packs in shared for members in packs for i in members]
    assert sorted(members) == step
    for packs in shared:
        for pack in packs:
            assert len(pack) <= 1 or sum(lengths[i] for i in pack) <= (pack_tokens or 10**9)


@given(st.integers(1, 500), st.floats(0, 0.9), st.sampled_from(["cosine", "wsd"]))
def test_the_schedule_rises_then_falls(steps, warmup, name):
    config = StudentConfig(warmup=warmup, schedule=name)
    rates = [schedule(i, steps, config) for i in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_wsd_stays_and_then_decays_to_almost_nothing():
    config = StudentConfig(warmup=0.1, schedule="wsd", decay=0.2)
    rates = [schedule(i, 100, config) for i in range(100)]
    assert rates[10:81] == [1.0] * 71
    assert rates[-1] == pytest.approx(0.05)


def test_observed_tokens_are_the_next_ones(store):
    sequence = store[1]
    found = observed_tokens(sequence)
    for index, position in enumerate(sequence.labelled):
        last = position == len(sequence.token_ids) - 1
        assert found[index] == (-100 if last else sequence.token_ids[position + 1])
