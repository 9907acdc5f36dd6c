"""The evaluation stage: measure, judge by the recipe's gate, and write it down.

The artifact is finished whether the gate passed or not: it is the evidence either way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seodang.artifact import Artifact, begin, write_atomically, write_json
from seodang.causal_lm import CausalLM, model_fingerprint
from seodang.corpus.build import read_documents, read_sequences
from seodang.evaluation.fidelity import measure
from seodang.evaluation.gate import check
from seodang.evaluation.report import render
from seodang.evaluation.samples import samples
from seodang.recipe import Recipe
from seodang.student.initialise import depth_pruned
from seodang.student.train import LOG

METRICS = "metrics.json"
SAMPLES = "samples.json"
REPORT = "report.html"


def evaluate(
    recipe: Recipe,
    teacher: Path,
    corpus: Artifact,
    soft_labels: Artifact,
    student: Artifact,
    cross_entropy: Artifact,
    out: Path,
) -> Artifact:
    """Measure teacher, student, untrained start and cross-entropy student on held-out documents.

    Raises ``WorkFailed`` if a model gives figures that are not finite.
    """
    config = {
        "evaluation": recipe.evaluation.model_dump(),
        "gate": recipe.gate.model_dump(),
    }
    inputs = {
        "teacher": model_fingerprint(teacher),
        "corpus": corpus.digest,
        "student": student.digest,
        "cross_entropy": cross_entropy.digest,
    }
    draft = begin(out, "evaluation", config, inputs)
    if isinstance(draft, Artifact):
        return draft

    reference = CausalLM.load(teacher)
    start = depth_pruned(teacher, student.manifest.summary["kept_layers"])
    untrained = start.to(reference.device).eval()
    models = {
        "student": CausalLM.load(student.path),
        "cross_entropy": CausalLM.load(cross_entropy.path),
        "untrained": CausalLM(untrained, reference.tokenizer),
    }
    sequences = read_sequences(corpus.path, "held_out")
    figures, calibration = measure(reference, models, sequences, recipe.evaluation.calibration_bins)
    shown = {"teacher": reference, **{k: models[k] for k in ("student", "cross_entropy")}}
    answers = samples(shown, recipe.evaluation.prompts, recipe.evaluation.max_new_tokens)
    metrics: dict[str, Any] = {
        "models": figures,
        "calibration": calibration,
        "held_out": {
            "documents": len(read_documents(corpus.path, "held_out")),
            "positions": sum(len(sequence.labelled) for sequence in sequences),
        },
        "gate": check(figures, recipe.gate),
    }
    write_json(draft.path / METRICS, metrics)
    write_json(draft.path / SAMPLES, answers)
    page = render(
        title=recipe.release.name,
        description=recipe.description,
        metrics=metrics,
        curves={"student": read_log(student), "cross_entropy": read_log(cross_entropy)},
        samples=answers,
        provenance=[
            _provenance("corpus", corpus),
            _provenance("soft labels", soft_labels),
            _provenance("student", student),
            _provenance("cross-entropy student (baseline)", cross_entropy),
        ],
    )
    write_atomically(draft.path / REPORT, page.encode())
    summary = {"gate_passed": metrics["gate"]["passed"], **metrics["held_out"]}
    return draft.finish(
        sources=student.manifest.sources, summary=summary, measured=[METRICS, REPORT]
    )


def read_log(student: Artifact) -> list[dict[str, Any]]:
    """The rows of a training run's log."""
    return [json.loads(line) for line in (student.path / LOG).read_text().splitlines()]


def _provenance(name: str, artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "kind": name,
        "digest": artifact.digest,
        "config": manifest.config,
        "inputs": manifest.inputs,
        "summary": manifest.summary,
        "sources": [source.model_dump() for source in manifest.sources],
    }
