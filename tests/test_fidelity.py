"""Fidelity of models with and without a trimmed vocabulary, against dense float64 references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from seodang.causal_lm import CausalLM
from seodang.corpus.sequences import TokenSequence, observed_tokens
from seodang.evaluation.fidelity import measure, partition
from seodang.recipe import VocabularyConfig
from seodang.softlabels.store import SoftLabelStore
from seodang.student.vocabulary import (
    TrimmedVocabulary,
    choose_vocabulary,
    trim_model,
    trim_tokenizer,
)
from tiny import TEXT, tiny_teacher
from tiny_store import config_of, synthetic_store

Log = np.ndarray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fidelity")
    tiny_teacher(folder / "teacher", hidden=32, heads=2)
    tiny_teacher(folder / "student", seed=1, layers=2, hidden=32, heads=2, tie_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def held_out(folder: Path) -> list[TokenSequence]:
    tokenizer = CausalLM.load(folder / "teacher").tokenizer
    rows = [np.array(tokenizer(line)["input_ids"], np.int32) for line in TEXT.splitlines()]
    return [
        TokenSequence(f"d{i}", ids, np.arange(i % 3, len(ids), 1 + i % 2, dtype=np.int32))
        for i, ids in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def vocabulary(folder: Path, held_out: list[TokenSequence]) -> TrimmedVocabulary:
    artifact = synthetic_store(
        folder / "store", config_of("head-tail"), held_out[::3], vocabulary=600
    )
    config = VocabularyConfig(trim=380)
    return choose_vocabulary(folder / "teacher", SoftLabelStore(artifact), config)


@pytest.fixture(scope="module")
def models(folder: Path, vocabulary: TrimmedVocabulary) -> dict[str, CausalLM]:
    """The student with the whole vocabulary, and the same one cut down."""
    cut = CausalLM.load(folder / "student").model
    trim_model(cut, vocabulary)
    cut.save_pretrained(folder / "trimmed")
    trim_tokenizer(folder / "teacher", vocabulary, folder / "trimmed")
    return {
        "whole": CausalLM.load(folder / "student"),
        "trimmed": CausalLM.load(folder / "trimmed"),
    }


def log_probs(model: CausalLM, token_ids: np.ndarray) -> Log:
    """Log-probabilities after each token in float64, (T, V)."""
    with torch.inference_mode():
        logits = model.model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0]
    return torch.log_softmax(logits.double(), -1).numpy()


def pushed(rows: Log, vocabulary: TrimmedVocabulary) -> Log:
    """Log-probabilities of the first pieces, one old id after the other."""
    out = np.zeros((len(rows), vocabulary.size))
    for old, first in enumerate(vocabulary.first.tolist()):
        out[:, first] += np.exp(rows[:, old])
    return np.log(np.maximum(out, 1e-300))


def kl(p: Log, q: Log) -> np.ndarray:
    return (np.exp(p) * (p - q)).sum(1)


def test_the_whole_vocabulary(
    folder: Path, held_out: list[TokenSequence], models: dict[str, CausalLM]
) -> None:
    teacher = CausalLM.load(folder / "teacher")
    figures, bins = measure(teacher, {"student": models["whole"]}, held_out, 10)
    expected: dict[str, list[np.ndarray]] = {"kl": [], "same": [], "nll": []}
    for s in held_out:
        p, q = (log_probs(m, s.token_ids)[s.labelled] for m in (teacher, models["whole"]))
        expected["kl"].append(kl(p, q))
        expected["same"].append(p.argmax(1) == q.argmax(1))
        observed = observed_tokens(s)
        seen = observed >= 0
        expected["nll"].append(-q[seen, observed[seen]])
    mean = {name: np.concatenate(rows).mean() for name, rows in expected.items()}
    found = figures["student"]
    assert found["kl"] == pytest.approx(mean["kl"], rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(mean["same"])
    assert found["perplexity"] == pytest.approx(np.exp(mean["nll"]), rel=1e-4)
    assert "full_kl" not in found
    assert figures["teacher"]["kl"] == 0.0
    seen_positions = sum(int((observed_tokens(s) >= 0).sum()) for s in held_out)
    assert sum(b["count"] for b in bins["student"]) == seen_positions
    assert partition(teacher, None) == "full vocabulary of 600"


def test_first_pieces_and_models_side_by_side(
    folder: Path,
    held_out: list[TokenSequence],
    models: dict[str, CausalLM],
    vocabulary: TrimmedVocabulary,
) -> None:
    teacher = CausalLM.load(folder / "teacher")
    figures, bins = measure(teacher, models, held_out, 10, vocabulary)
    expected: dict[str, list[np.ndarray]] = {
        name: []
        for name in ("whole", "trimmed", "full", "moved", "whole nll", "trimmed nll", "hits")
    }
    spelled_out = 0
    for s in held_out:
        spelled, last = vocabulary.spell_out(s.token_ids)
        p = log_probs(teacher, s.token_ids)[s.labelled]
        whole = log_probs(models["whole"], s.token_ids)[s.labelled]
        pieces = log_probs(models["trimmed"], spelled)
        trimmed = pieces[last[s.labelled]]
        expected["full"].append(kl(p, whole))
        expected["whole"].append(kl(pushed(p, vocabulary), pushed(whole, vocabulary)))
        expected["trimmed"].append(kl(pushed(p, vocabulary), trimmed))
        expected["moved"].append(np.exp(p)[:, vocabulary.new_ids < 0].sum(1))
        for row, (position, token) in enumerate(zip(s.labelled, observed_tokens(s), strict=True)):
            if token < 0:
                continue
            expected["whole nll"].append(-whole[row, [token]])
            written = vocabulary.spell_out(np.array([token]))[0]
            spelled_out += len(written) > 1
            at = last[position] + np.arange(len(written))
            expected["trimmed nll"].append(-pieces[at, written].sum(keepdims=True))
            expected["hits"].append(np.array([trimmed[row].argmax() == written[0]]))
    assert spelled_out > 20
    mean = {name: np.concatenate(rows).mean() for name, rows in expected.items()}
    for name in ("whole", "trimmed"):
        assert figures[name]["kl"] == pytest.approx(mean[name], rel=1e-4)
        assert figures[name]["perplexity"] == pytest.approx(np.exp(mean[f"{name} nll"]), rel=1e-4)
    assert figures["whole"]["full_kl"] == pytest.approx(mean["full"], rel=1e-4)
    assert figures["whole"]["kl"] < figures["whole"]["full_kl"]
    assert figures["teacher"]["moved_mass"] == pytest.approx(mean["moved"], rel=1e-4)
    assert figures["teacher"]["kl"] == 0.0
    assert figures["teacher"]["top1_agreement"] == 1.0
    assert "full_kl" not in figures["trimmed"]
    hits = sum(b["accuracy"] * b["count"] for b in bins["trimmed"])
    assert hits == pytest.approx(np.concatenate(expected["hits"]).sum())
    assert partition(teacher, vocabulary) == "first pieces in 380 kept entries of 600"


def test_a_trimmed_model_needs_its_vocabulary(
    folder: Path,
    held_out: list[TokenSequence],
    models: dict[str, CausalLM],
    vocabulary: TrimmedVocabulary,
) -> None:
    teacher = CausalLM.load(folder / "teacher")
    with pytest.raises(ValueError, match="trimmed has 380 entries, the teacher 600"):
        measure(teacher, models, held_out, 10)
    other = TrimmedVocabulary(vocabulary.kept[:-1], vocabulary.piece_offsets, vocabulary.pieces)
    with pytest.raises(ValueError, match="trimmed has 380 entries"):
        measure(teacher, models, held_out, 10, other)
