"""What pretraining is made of: experts, optimizers, spikes, and several processes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seodang.artifact import Artifact
from seodang.errors import InputError, WorkFailed
from seodang.foundation.model_config import ModelConfig
from seodang.foundation.pretraining.config import SpikesConfig
from seodang.foundation.pretraining.expert_parallel import spread_experts
from seodang.foundation.pretraining.module import Pretraining
from seodang.foundation.pretraining.optimizers import make_optimizers
from seodang.foundation.pretraining.pretrain import pretrain
from seodang.training import checkpoint
from seodang.training.log import LOG, SPEED, read_rows
from seodang.training.parallel import Processes
from seodang.training.spikes import LossSpike, SpikeWatch, read_spikes, skipped_steps
from tiny_foundation import CONFIG, MODEL, tiny_tokens

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_tokens(tmp_path_factory.mktemp("tokens"))


def changed(**keys):
    return CONFIG.model_copy(update=keys)


# Optimizers


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    module = Pretraining(MODEL, MODEL.vocabulary, 0.0)
    muon, adamw = make_optimizers(module, changed(optimizer="muon"))
    names = {id(p): n for n, p in module.named_parameters()}
    taken = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    rest = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert sorted(taken + rest) == sorted(names.values())
    assert all(".self_attn." in name or ".mlp." in name for name in taken)
    assert any(name.endswith("experts.gate_up_proj") for name in rest)
    assert any(name.endswith("embed_tokens.weight") for name in rest)
    assert any(name.endswith("gate.weight") for name in rest)


def test_a_checkpoint_of_several_optimizers_and_buffers_is_exact(tmp_path):
    def make():
        torch.manual_seed(0)
        module = Pretraining(MODEL, MODEL.vocabulary, 0.0)
        return module, make_optimizers(module, changed(optimizer="muon"))

    def step(module, optimizers, seed):
        torch.manual_seed(seed)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()

    module, optimizers = make()
    for seed in range(3):
        step(module, optimizers, seed)
    name, bias = next((n, b) for n, b in module.named_buffers() if "correction" in n)
    bias += 0.25
    checkpoint.save(tmp_path, 5, module, optimizers, ALONE, skipped=2)
    fresh, others = make()
    assert checkpoint.load(tmp_path, fresh, others, ALONE) == 5
    assert torch.equal(dict(fresh.named_buffers())[name], bias)
    step(module, optimizers, 9)
    step(fresh, others, 9)  # the same momenta, and the same number of steps
    for one, other in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


# Spikes


@given(st.integers(0, 9), st.floats(0.01, 1))
def test_a_loss_far_above_the_others_is_a_spike(seed, spread):
    watch = SpikeWatch(window=32, threshold=8)
    losses = np.random.default_rng(seed).normal(5, spread, 60).tolist()
    assert not any(watch.jumps(loss) for loss in losses)
    middle = float(np.median(losses[-32:]))
    deviation = 1.4826 * float(np.median(np.abs(np.array(losses[-32:]) - middle)))
    assert watch.score(middle + 5) == pytest.approx(5 / max(deviation, 0.02))
    assert watch.jumps(middle + 9 * max(deviation, 0.02))
    assert watch.jumps(float("nan"))
    assert not watch.jumps(middle - 3 * deviation)


def spiking(made, monkeypatch, poisoned_step):
    """Let a step predict what never comes, whenever it is taken."""
    from seodang.foundation.pretraining import pretrain as module
    from seodang.foundation.pretraining.batches import plan_pretraining
    from seodang.foundation.pretraining.tokens import TokenStore

    config = changed(
        tokens=24_000,
        checkpoint_steps=5,
        spikes=SpikesConfig(window=8, threshold=3.0, most=6),
    )
    store = TokenStore(made[1], "train")
    steps = plan_pretraining(store, config, MODEL.context)
    bad = steps[poisoned_step][0]
    make = module.batch

    def poisoned(store, pieces):
        found = make(store, pieces)
        if bad in pieces:  # the last entry is a spare one, which no text has
            return replace(found, targets=torch.full_like(found.targets, 511))
        return found

    monkeypatch.setattr(module, "batch", poisoned)
    return config


def test_a_spike_is_rolled_back_named_and_left_out(made, tmp_path, monkeypatch, capsys):
    config = spiking(made, monkeypatch, 17)
    tokenizer, tokens = made
    base = pretrain(config, MODEL, tokens, tokenizer, tmp_path / "base")
    (spike,) = read_spikes(base.path)
    assert spike["steps"] == [16, 17]
    said = capsys.readouterr().err
    assert "step 17: the loss jumped to" in said
    assert spike["documents"][0] in said
    rows = read_rows(base.path / LOG)
    assert [row["step"] for row in rows if "skipped" in row] == [17, 18]
    assert len(rows) == len(read_rows(base.path / SPEED))
    losses = [row["cross_entropy"] for row in rows if "loss" in row]
    assert max(losses[12:]) < losses[9]

    # Stopped after the rollback and continued, it is the same model.
    from seodang.training import loop

    save = loop.checkpoint.save

    def stop(folder, step, *arguments):
        save(folder, step, *arguments)
        if step == 20:
            raise RuntimeError("synthetic crash")

    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint, "save", stop)
        with pytest.raises(RuntimeError, match="synthetic"):
            pretrain(config, MODEL, tokens, tokenizer, tmp_path / "again")
    again = pretrain(config, MODEL, tokens, tokenizer, tmp_path / "again")
    assert again.digest == base.digest


def test_too_many_spikes_end_the_training(tmp_path):
    watch = SpikeWatch(most=4)
    LossSpike(5, 9.0, watch, ["a"]).write_down(tmp_path, ALONE)
    LossSpike(8, float("nan"), watch, ["b"]).write_down(tmp_path, ALONE)
    assert skipped_steps(tmp_path) == {4, 5, 7, 8}
    with pytest.raises(WorkFailed, match=r"step 11: the loss jumped.*4 steps are left out already"):
        LossSpike(11, 9.0, watch, ["c"]).write_down(tmp_path, ALONE)
    assert [spike["loss"] for spike in read_spikes(tmp_path)] == [9.0, None]


# Several processes

JOB = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tiny_foundation import CONFIG, MODEL
from seodang.artifact import Artifact
from seodang.foundation.pretraining.pretrain import pretrain
folder, out, spread = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "spread"
keys = {"expert_parallel": spread, "learning_rate": 1e-3, "tokens": 8000}
pretrain(CONFIG.model_copy(update=keys), MODEL, Artifact.open(folder / "tokens"),
         Artifact.open(folder / "tokenizer"), out)
"""


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    tokenizer, tokens = made
    config = changed(learning_rate=1e-3, tokens=8000)
    return pretrain(config, MODEL, tokens, tokenizer, tmp_path_factory.mktemp("one") / "base")


@pytest.mark.parametrize("how", ["sharded", "spread"])
def test_two_processes_give_the_losses_of_one(made, alone, tmp_path, how):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    out = tmp_path / "base"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", script),
            *(Path(__file__).parent, made[1].path.parent, out, how),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    base = Artifact.open(out)
    for row, expected in zip(read_rows(out / LOG), read_rows(alone.path / LOG), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)
        assert row["load_max/1"] == pytest.approx(expected["load_max/1"], abs=0.02)
    found, expected = (a.manifest.summary["held_out_nats_per_byte"] for a in (base, alone))
    assert found["all"] == pytest.approx(expected["all"], abs=1e-4)


def test_processes_must_divide_the_experts():
    module = Pretraining(ModelConfig(**MODEL.model_dump()), MODEL.vocabulary, 0.0)
    with pytest.raises(InputError, match=r"model\.experts \(8\) must be a multiple of the 3"):
        spread_experts(module, Processes(0, 3, torch.device("cpu")))
