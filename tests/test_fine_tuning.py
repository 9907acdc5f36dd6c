"""A teacher that is trained on the corpus before it labels it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from seodang.corpus.build import build, read_sequences
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError
from seodang.recipe import TeacherTuningConfig
from seodang.recipe_file import load_recipe
from seodang.softlabels.store import open as open_store
from seodang.student.fine_tuning import fine_tune
from seodang.training import loop
from tiny_run import seodang, tiny_recipe

TUNING: dict[str, Any] = {
    "epochs": 3,
    "batch_tokens": 256,
    "learning_rate": 3e-3,
    "checkpoint_steps": 4,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    changes = {"teacher": {"fine_tuning": TUNING}, "release": {"quantizations": []}}
    return tiny_recipe(folder, **changes)


@pytest.fixture(scope="module")
def teacher(recipe: Path) -> Path:
    return recipe.parent / "teacher"


@pytest.fixture(scope="module")
def corpus(recipe: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    tokenizer = load_tokenizer(teacher)
    config = load_recipe(recipe).corpus
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    return build(config, tokenizer, tokenizer_fingerprint(tokenizer), out)


@pytest.fixture(scope="module")
def tuned(teacher: Path, corpus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = TeacherTuningConfig(**TUNING)
    return fine_tune(teacher, corpus, config, tmp_path_factory.mktemp("tuned") / "teacher")


def nll(directory: Path, sequences: list[TokenSequence]) -> float:
    """Mean negative log-likelihood after labelled positions, one by one in float64."""
    model = CausalLM.load(directory).model.double()
    total, count = 0.0, 0
    for sequence in sequences:
        ids = torch.from_numpy(sequence.token_ids.astype("int64"))
        with torch.no_grad():
            log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        for position in sequence.labelled[sequence.labelled + 1 < len(ids)]:
            total -= float(log_probs[position, ids[position + 1]])
            count += 1
    return total / count


def test_it_predicts_the_answers_better_and_reads_as_before(
    tuned: Artifact, teacher: Path, corpus: Artifact
) -> None:
    held_out = read_sequences(corpus.path, "held_out")
    assert nll(tuned.path, held_out) < nll(teacher, held_out) - 0.5
    same = (tokenizer_fingerprint(load_tokenizer(path)) for path in (tuned.path, teacher))
    assert len(set(same)) == 1
    assert not tuned.verify()


def test_a_step_is_that_of_plain_pytorch(teacher: Path, corpus: Artifact, tmp_path: Path) -> None:
    sequences = read_sequences(corpus.path, "train")
    everything = sum(len(sequence.token_ids) for sequence in sequences)
    config = TeacherTuningConfig(batch_tokens=everything, warmup=0.0, gradient_clip=1e9)
    made = fine_tune(teacher, corpus, config, tmp_path / "teacher")
    model: Any = CausalLM.load(teacher).model
    count = sum(len(sequence.labelled) for sequence in sequences)
    for sequence in sequences:
        ids = torch.from_numpy(sequence.token_ids.astype("int64"))
        rows = sequence.labelled[sequence.labelled + 1 < len(ids)]
        logits = model(input_ids=ids[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[rows], ids[rows + 1], reduction="sum")
        (loss / count).backward()
    log = (made.path / "training.jsonl").read_text().splitlines()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    assert len(log) == 1
    assert json.loads(log[0])["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_stopped_it_goes_on_to_the_same_weights(
    tuned: Artifact,
    teacher: Path,
    corpus: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, steps = torch.optim.AdamW.step, 0

    def step(self: Any, *arguments: Any) -> Any:
        nonlocal steps
        if (steps := steps + 1) == 7:  # after the first checkpoint
            raise KeyboardInterrupt
        return real(self, *arguments)

    out = tmp_path / "teacher"
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(teacher, corpus, TeacherTuningConfig(**TUNING), out)
    monkeypatch.undo()
    assert (out / loop.CHECKPOINTS).exists()
    again = fine_tune(teacher, corpus, TeacherTuningConfig(**TUNING), out)
    expected = load_file(tuned.path / "model.safetensors")
    for name, weight in load_file(again.path / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


def test_the_run_labels_with_what_the_teacher_became(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = seodang("run", recipe, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert list(stages)[:3] == ["corpus", "teacher", "soft-labels"]
    store = open_store(out / "soft-labels")
    assert store.artifact.manifest.inputs["teacher"] == model_fingerprint(out / "teacher")
    swept = seodang(
        *("sweep", recipe, "--out", tmp_path / "sweep", "--vary", "student.layers=1,2", "--json")
    )
    assert swept.returncode == 0, swept.stderr
    weights = (p / "teacher" / "model.safetensors" for p in (out, tmp_path / "sweep"))
    assert len({path.read_bytes() for path in weights}) == 1


def test_a_served_teacher_is_not_trained(recipe: Path) -> None:
    settings = ["teacher.server=http://127.0.0.1:9/v1", "teacher.model=t"]
    with pytest.raises(InputError, match="a served teacher is not trained here"):
        load_recipe(recipe, settings)
