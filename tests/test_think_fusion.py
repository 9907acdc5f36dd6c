"""The four steps on a tiny random model: repeatable, resumable, measured, and quiet on stdout."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from seodang.artifact import Artifact
from seodang.causal_lm import load_tokenizer
from seodang.corpus.sequences import UNOBSERVED
from seodang.errors import InputError
from seodang.foundation.post_training import modes, policy_optimization, policy_trainer
from seodang.foundation.post_training.config import PolicyConfig
from seodang.foundation.post_training.fine_tuning import (
    batch_order,
    completion_loss,
    example,
    prompt,
)
from seodang.foundation.post_training.policy_optimization import (
    in_turns,
    optimize_policy,
    reward_functions,
)
from seodang.foundation.post_training.problem import MODES
from seodang.foundation.post_training.reasoning_data import (
    build_reasoning_data,
    make_problem,
    read_problems,
)
from seodang.foundation.post_training.replay import text_windows, with_text
from seodang.foundation.post_training.think_fusion import STEPS, PostTrained, post_train
from seodang.foundation.post_training.trainers import last_checkpoint
from seodang.foundation.pretraining.tokens import TokenStore
from seodang.stages import Stages
from tiny_think import STAGES, TINY, tiny_answering, tiny_base, tiny_tokens

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_reasoning_data(TINY, tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def answering(base: Artifact, data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_answering(base, data, tmp_path_factory.mktemp("answering") / "model")


@pytest.fixture(scope="module")
def tokens(base: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_tokens(base, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def text(tokens: Artifact) -> TokenStore:
    return TokenStore(tokens, "train")


@pytest.fixture(scope="module")
def done(base: Artifact, tokens: Artifact, tmp_path_factory: pytest.TempPathFactory) -> PostTrained:
    return post_train(TINY, base, tokens, Stages(tmp_path_factory.mktemp("post") / "training"))


def test_every_step_is_a_model_and_measured(done: PostTrained, base: Artifact) -> None:
    assert tuple(done.models) == tuple(done.measured) == STEPS
    before = load_file(base.path / "model.safetensors")
    for step, artifact in done.models.items():
        assert not artifact.verify()
        model: Any = AutoModelForCausalLM.from_pretrained(artifact.path)
        tokenizer = load_tokenizer(artifact.path)
        assert model.generation_config.eos_token_id == [
            tokenizer.eos_token_id,
            tokenizer.bos_token_id,
        ]
        assert load_file(artifact.path / "model.safetensors").keys() == before.keys(), step
    assert done.model is done.models["policy"]


def test_nothing_is_done_twice(done: PostTrained, base: Artifact, tokens: Artifact) -> None:
    out = done.models["instruct"].path.parent
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}
    stage = Stages(out)
    assert post_train(TINY, base, tokens, stage).to_json() == done.to_json()
    assert list(stage.done) == ["data", *STEPS, *(f"measured/{step}" for step in STEPS)]
    assert not any(made["ran"] for made in stage.done.values())
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()} == before


def test_the_merge_is_of_the_two_fine_tunings(done: PostTrained) -> None:
    merged, reasoning, instruct = (
        load_file(done.models[step].path / "model.safetensors")
        for step in ("merged", "reasoning", "instruct")
    )
    for name, tensor in merged.items():
        expected = 0.8 * reasoning[name].double() + 0.2 * instruct[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_loss_is_that_of_the_completions_alone(base: Artifact) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base.path)
    ids = torch.randint(10, 400, (3, 12), generator=torch.Generator().manual_seed(1))
    labels, attention_mask = ids.clone(), torch.ones_like(ids)
    for row, (asked, length) in enumerate(((4, 12), (7, 9), (1, 5))):
        labels[row, :asked] = labels[row, length:] = UNOBSERVED
        attention_mask[row, length:] = 0
    loss = completion_loss(model, ids, labels, attention_mask)
    expected = model(input_ids=ids, attention_mask=attention_mask, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    text = ids[:2].clone()
    with_text = completion_loss(
        model,
        torch.cat([ids, text]),
        torch.cat([labels, text]),
        torch.cat([attention_mask, torch.ones_like(text)]),
        text_weight=0.3,
    )
    torch.testing.assert_close(with_text, expected + 0.3 * model(input_ids=text, labels=text).loss)
    other = completion_loss(model, ids.where(attention_mask.bool(), 5), labels, attention_mask)
    torch.testing.assert_close(loss, other)


def test_fine_tuning_learns(done: PostTrained) -> None:
    """Far from well in so few steps, but each of the two its own kind of answer better."""
    lengths = [done.measured[step].manifest.summary for step in ("instruct", "reasoning")]
    assert all(summary["think"]["prompts"] == TINY.held_out for summary in lengths)
    log = (done.models["reasoning"].path / "training.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert len(losses) == TINY.problems / TINY.reasoning.batch_sequences
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def killed(
    answering: Artifact, data: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The directories of two stages that were killed between two checkpoints."""
    out = tmp_path_factory.mktemp("killed")
    command = [sys.executable, HERE / "killed_stage.py", answering.path, data.path, out]
    command += ["tuning=4", "policy=3"]
    done = subprocess.run(command, check=True, timeout=300, stdout=subprocess.PIPE)
    assert set(json.loads(done.stdout).values()) == {-signal.SIGKILL}
    return {name: out / name for name in STAGES}


@pytest.mark.parametrize(("stage", "saved"), [("tuning", 3), ("policy", 2)])
def test_killed_and_resumed_is_as_if_never_stopped(
    stage: str,
    saved: int,
    killed: dict[str, Path],
    answering: Artifact,
    data: Artifact,
    tmp_path: Path,
) -> None:
    whole = STAGES[stage](answering, data, tmp_path / "whole")
    folder = killed[stage] / "checkpoints"
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    broken = folder / "checkpoint-9"  # a kill in the midst of writing it
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    resumed = STAGES[stage](answering, data, killed[stage])
    assert resumed.digest == whole.digest
    before, after = (load_file(a.path / "model.safetensors") for a in (answering, resumed))
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert not folder.exists()


def test_a_round_compares_answers(answering: Artifact, data: Artifact, tmp_path: Path) -> None:
    made = STAGES["policy"](answering, data, tmp_path / "out")
    log = [json.loads(line) for line in (made.path / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    for row in log:
        assert row["reward"] == row["rewards/correct/mean"] + row["rewards/format/mean"]
    assert max(row["reward_std"] for row in log) > 0
    assert made.manifest.summary == {"instructions": 6, "answers": 6 * 2 * 4}


def test_answers_too_many_for_one_pass_teach_the_same(
    answering: Artifact, data: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers, whose gradients are added up over four passes."""
    config = TINY.model_copy(
        update={"policy": PolicyConfig(rounds=1, instructions=2, answers=4, learning_rate=1e-3)}
    )
    at_once = optimize_policy(config, answering, data, tmp_path / "one")
    monkeypatch.setattr(policy_optimization, "AT_ONCE", 4)
    in_parts = optimize_policy(config, answering, data, tmp_path / "four")
    one, four, before = (
        load_file(a.path / "model.safetensors") for a in (at_once, in_parts, answering)
    )
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, one[name])}
    assert moved == {name for name in before if name.endswith("norm.weight")}
    assert moved == {name for name in before if not torch.equal(before[name], four[name])}
    # Adam's first step is the sign of a gradient, whose last bits differ.
    same = [
        torch.isclose(one[name], four[name], rtol=0, atol=1e-5).float().mean() for name in moved
    ]
    assert min(same) > 0.98


def test_a_policy_is_asked_every_task_alike_however_rare(data: Artifact) -> None:
    known = read_problems(data, "train")[0]
    rare = [replace(known, task="aiw", question=f"rare {n}") for n in range(3)]
    common = [replace(known, task="chain_sum", question=f"sum {n}") for n in range(40)]
    asked = in_turns([*rare, *common], 8)
    assert [problem.task for problem in asked[:6]] == ["aiw", "chain_sum"] * 3
    assert [p.question for p in asked if p.task == "chain_sum"] == [f"sum {n}" for n in range(5)]
    assert len(in_turns([*rare, *common], 100)) == 43
    assert in_turns([], 8) == []


def test_the_reward_rises(answering: Artifact, tmp_path: Path) -> None:
    """The tuned model ends some answers in time; reinforced, nearly all that it can (half)."""
    policy = PolicyConfig(rounds=20, instructions=2, answers=64, learning_rate=0.1, kl_weight=0.02)
    config = TINY.model_copy(update={"policy": policy, "problems": 60})
    data = build_reasoning_data(config, tmp_path / "data")
    made = optimize_policy(config, answering, data, tmp_path / "out")
    log = [json.loads(line) for line in (made.path / "training.jsonl").read_text().splitlines()]
    kept = [row["rewards/format/mean"] for row in log]
    assert sum(kept[-3:]) / 3 > kept[0] + 0.1


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (11, '{"glo')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_nothing_on_standard_output(
    base: Artifact, data: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, stage in STAGES.items():
        stage(base, data, tmp_path / name)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Warning" not in captured.err


def test_the_loss_is_on_the_assistants_words(base: Artifact) -> None:
    tokenizer = load_tokenizer(base.path)
    problem = make_problem(0, 1)
    for mode in MODES:
        row = example(problem, mode, tokenizer)
        labels = [token for token in row["labels"] if token != UNOBSERVED]
        assert tokenizer.decode(labels) == problem.completion(mode) + "<|im_end|>"
        text = tokenizer.decode(row["input_ids"])
        assert text == prompt(problem, mode, tokenizer) + tokenizer.decode(labels)
        assert row["input_ids"][-len(labels) :] == labels
    assert "</think>" not in problem.completion("instant")


@given(lengths=st.lists(st.integers(1, 300), max_size=9), seed=st.integers(0, 5))
def test_windows_are_pieces_of_the_text(text: TokenStore, lengths: list[int], seed: int) -> None:
    windows = text_windows(text, lengths, [seed])
    assert windows == text_windows(text, lengths, [seed])
    documents = [f" {' '.join(map(str, text.tokens(i)))} " for i in range(len(text))]
    for ids, length in zip(windows, lengths, strict=True):
        piece = f" {' '.join(map(str, ids))} "
        whole = [int(n) for n, d in zip(text.lengths, documents, strict=True) if piece in d]
        assert len(ids) in {min(length, tokens) for tokens in whole}


def test_every_token_is_as_likely(text: TokenStore) -> None:
    drawn = Counter(ids[0] for ids in text_windows(text, [1] * 20_000, [0]))
    ids, counts = np.unique(
        np.concatenate([text.tokens(i) for i in range(len(text))]), return_counts=True
    )
    found = [drawn[int(i)] for i in ids]
    assert chisquare(found, counts / counts.sum() * 20_000).pvalue > 1e-3


def test_every_step_brings_text_back(text: TokenStore) -> None:
    rows = [{"input_ids": [9] * n, "labels": [UNOBSERVED] * n} for n in (3, 5, 4, 7, 2)]
    mixed = with_text(rows, 2, text, 3, [0])
    assert [mixed[i] for i in (0, 1, 5, 6, 10)] == rows
    windows = [mixed[i] for i in (2, 3, 4, 7, 8, 9, 11, 12, 13)]
    assert all(row["labels"] == row["input_ids"] for row in windows)
    assert [len(row["input_ids"]) for row in windows] == [5] * 3 + [7] * 3 + [2] * 3
    assert with_text(rows, 2, text, 0, [0]) == rows


@pytest.mark.parametrize("scored", [4, 40, 4000])
def test_log_probabilities_are_those_of_every_answer_alone(
    base: Artifact, scored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_trainer, "SCORED_TOKENS", scored)
    network: Any = AutoModelForCausalLM.from_pretrained(base.path)
    rng = np.random.default_rng(scored)
    asked, said = [5, 1, 9, 2], [3, 6, 0, 1]
    ids = torch.from_numpy(rng.integers(10, 400, (4, 9 + 6)))
    places = torch.arange(9 + 6)
    mask = torch.stack(
        [(places >= 9 - a) & (places < 9 + n) for a, n in zip(asked, said, strict=True)]
    ).long()
    found = policy_trainer.token_log_probs(network, ids, mask, 6, 0.7)
    for row, (before, length) in enumerate(zip(asked, said, strict=True)):
        logits = network(ids[row][mask[row].bool()][None]).logits[0]
        log_p = torch.log_softmax(logits / 0.7, -1)[before - 1 : before - 1 + length]
        drawn = ids[row, 9 : 9 + length]
        expected = torch.zeros(2, 6)
        expected[0, :length] = log_p.gather(1, drawn[:, None])[:, 0]
        expected[1, :length] = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(torch.stack(found)[:, row], expected, rtol=1e-5, atol=1e-5)
    changed = ids.where(mask.bool(), 7)
    again = policy_trainer.token_log_probs(network, changed, mask, 6, 0.7)
    torch.testing.assert_close(again, found)
    found[0].sum().backward()
    assert network.get_input_embeddings().weight.grad.abs().sum() > 0


@given(st.lists(st.integers(1, 90), max_size=50), st.integers(1, 9), st.integers(0, 5))
def test_batches_hold_equal_lengths(lengths: list[int], size: int, seed: int) -> None:
    order = batch_order(lengths, size, [seed])
    assert sorted(order) == list(range(len(lengths)))
    full = len(order) // size * size
    batches = [sorted(lengths[i] for i in order[k : k + size]) for k in range(0, full, size)]
    batches.sort()
    assert [x for batch in batches for x in batch] == sorted(lengths[i] for i in order[:full])


def test_rewards_are_of_the_row_that_was_asked() -> None:
    asked = [(make_problem(n, 1), mode) for n in (0, 1) for mode in MODES]
    correct, kept = reward_functions(asked, eos=2)
    said = [problem.completion(mode) for problem, mode in asked]
    given = {"completions": said, "completion_ids": [[7, 2]] * 4}
    assert correct(**given, number=[0, 1, 2, 3], prompts=[]) == [1.0] * 4
    assert kept(**given, number=[0, 1, 2, 3]) == [0.0] * 4
    assert kept(**given, number=[1, 0, 3, 2]) == [-1.0] * 4
    assert kept(said, [[7, 2], [7, 7], [2], []], number=[0, 1, 2, 3]) == [0.0, -1.0, 0.0, -1.0]
    assert correct(**given, number=[2, 3, 0, 1]) == [-1.0] * 4


def answered(number: int, mode: Any, said: str, ended: bool = True) -> modes.Answered:
    return modes.Answered(make_problem(number, 1), mode, said, ended, 10)


def test_figures() -> None:
    right = [make_problem(n, 1).completion("think") for n in range(4)]
    found = modes.figures(
        [
            answered(0, "think", right[0]),
            answered(1, "think", right[1], ended=False),
            answered(2, "think", "</think>-"),
            answered(3, "think", make_problem(3, 1).answer),
        ]
    )
    assert (found["prompts"], found["obeyed"], found["accuracy"]) == (4, 0.5, 0.75)
    assert found["reward"] == (1 + 0 - 1 + 0) / 4
    assert found["accuracy_by_language"] == {"ko": 0.75}
    assert set(found["accuracy_by_task"].values()) == {1.0, 0.0}


def test_the_table_has_a_row_for_each_step(done: PostTrained) -> None:
    console = Console(width=100, record=True, file=None, quiet=False, stderr=True)
    console.print(modes.table(done.measured))
    text = console.export_text()
    assert all(step in text for step in STEPS)
    assert "synthetic" in text
    rows = done.to_json()
    assert [row["step"] for row in rows] == list(STEPS)
    for row in rows:
        for mode in MODES:
            assert 0 <= row[mode]["obeyed"] <= 1
            assert -2 <= row[mode]["reward"] <= 1


def test_answers_are_kept_for_reading(done: PostTrained, data: Artifact) -> None:
    lines = (done.measured["policy"].path / modes.ANSWERS).read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["mode"] for row in rows] == ["think"] * 6 + ["instant"] * 6
    held_out = read_problems(data, "held-out")
    assert [row["question"] for row in rows] == [p.question for p in held_out] * 2
    assert [row["expected"] for row in rows] == [p.answer for p in held_out] * 2


def test_what_is_missing_is_named(
    base: Artifact, data: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl.trainer.sft_trainer", None)
    with pytest.raises(InputError, match="pip install 'seodang"):
        STAGES["tuning"](base, data, tmp_path / "out")
