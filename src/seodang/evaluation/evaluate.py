"""The evaluation stage: measure, judge by the recipe's gate, and write it down.

The artifact is finished whether the gate passed or not: it is the evidence either way.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.artifact import (
    Artifact,
    begin,
    canonical_json,
    sha256_bytes,
    write_atomically,
    write_json,
)
from seodang.causal_lm import CausalLM, model_fingerprint
from seodang.corpus.build import read_documents, read_sequences
from seodang.evaluation.fidelity import measure, partition
from seodang.evaluation.gate import check_metrics, read_metrics
from seodang.evaluation.on_policy import judge
from seodang.evaluation.report import render
from seodang.evaluation.responding import LocalModel
from seodang.evaluation.samples import samples
from seodang.evaluation.task_evaluation import measure_tasks
from seodang.evaluation.tasks import load_task
from seodang.recipe import Recipe
from seodang.student.train import untrained, vocabulary_of
from seodang.training.log import LOG, read_rows

if TYPE_CHECKING:
    from seodang.softlabels.labelling import Teacher

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
    *,
    after_on_policy: Artifact | None = None,
    scorer: Teacher | None = None,
) -> Artifact:
    """Measure teacher, student, untrained start and cross-entropy student on held-out documents.

    If the recipe has tasks, these four are measured on their held-out examples too.

    ``after_on_policy`` is the student after that stage, and ``scorer`` the teacher that scores its
    own words: the better of the two is the ``student`` of the figures and the gate, the other one
    ``before_on_policy`` or ``after_on_policy``, and ``on_policy`` says why.

    Raises ``WorkFailed`` if a model gives figures that are not finite.
    """
    tasks = [load_task(task) for task in recipe.tasks]
    previous = None if recipe.gate.previous is None else read_metrics(Path(recipe.gate.previous))
    config = {
        "evaluation": recipe.evaluation.model_dump(),
        "gate": recipe.gate.model_dump(exclude={"previous"}),
    }
    inputs = {
        "teacher": model_fingerprint(teacher),
        "corpus": corpus.digest,
        "student": student.digest,
        "cross_entropy": cross_entropy.digest,
    }
    if after_on_policy is not None:
        inputs["after_on_policy"] = after_on_policy.digest
    inputs |= {f"task:{task.name}": task.digest for task in tasks}
    if previous is not None:
        inputs["previous"] = sha256_bytes(canonical_json(previous.get("tasks")))
    draft = begin(out, "evaluation", config, inputs)
    if isinstance(draft, Artifact):
        return draft

    reference = CausalLM.load(teacher)
    start = untrained(student.path, teacher, recipe.student).to(reference.device).eval()
    trained = CausalLM.load(student.path)
    models = {
        "student": trained,
        "cross_entropy": CausalLM.load(cross_entropy.path),
        "untrained": CausalLM(start, trained.tokenizer),
    }
    if after_on_policy is not None:
        models["after_on_policy"] = CausalLM.load(after_on_policy.path)
    vocabulary = vocabulary_of(student.path)
    sequences = read_sequences(corpus.path, "held_out")
    figures, calibration = measure(
        reference, models, sequences, recipe.evaluation.calibration_bins, vocabulary
    )
    judged = None
    if after_on_policy is not None and scorer is not None:
        judged = judge(
            student, after_on_policy, scorer, corpus, recipe.student, figures, recipe.gate
        )
        if judged["kept"]:
            groups: list[dict[str, Any]] = [figures, calibration, models]
            for by_model in groups:
                by_model["before_on_policy"] = by_model["student"]
                by_model["student"] = by_model.pop("after_on_policy")
    shown = {"teacher": reference, **{k: models[k] for k in ("student", "cross_entropy")}}
    answers = samples(shown, recipe.evaluation.prompts, recipe.evaluation.max_new_tokens)
    metrics: dict[str, Any] = {
        "models": figures,
        "calibration": calibration,
        "held_out": {
            "documents": len(read_documents(corpus.path, "held_out")),
            "positions": sum(len(sequence.labelled) for sequence in sequences),
        },
        "partition": partition(reference, vocabulary),
    }
    if tasks:
        everyone = {"teacher": reference, **models}
        metrics |= measure_tasks(
            {name: LocalModel(model) for name, model in everyone.items()},
            tasks,
            draft.path,
            compared="student",
            robust=("student", "cross_entropy"),
            timed=("teacher", "student", "cross_entropy"),
        )
    metrics["gate"] = check_metrics(metrics, recipe.gate, previous)
    if judged is not None:
        metrics["on_policy"] = judged
    write_json(draft.path / METRICS, metrics)
    write_json(draft.path / SAMPLES, answers)
    page = render(
        title=recipe.release.name,
        description=recipe.description,
        metrics=metrics,
        curves={
            "student": read_rows(student.path / LOG),
            "cross_entropy": read_rows(cross_entropy.path / LOG),
        },
        samples=answers,
        provenance=[
            _provenance("corpus", corpus),
            _provenance("soft labels", soft_labels),
            _provenance("student", student),
            *([_provenance("on-policy student", after_on_policy)] if after_on_policy else []),
            _provenance("cross-entropy student (baseline)", cross_entropy),
        ],
    )
    write_atomically(draft.path / REPORT, page.encode())
    summary = {"gate_passed": metrics["gate"]["passed"], **metrics["held_out"]}
    return draft.finish(
        sources=student.manifest.sources, summary=summary, measured=[METRICS, REPORT]
    )


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
