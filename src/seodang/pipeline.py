"""A whole run: documents to corpus, soft labels, student, evaluation and signed release.

Each stage is an artifact; one whose inputs and config did not change is not run again.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from seodang.artifact import MANIFEST, Artifact, Source
from seodang.errors import InputError, WorkFailed
from seodang.progress import say
from seodang.recipe import Recipe, TeacherConfig
from seodang.stages import Stages, claimed, say_if_nothing_ran

FOUNDATION = "foundation"  # where a teacher of our own is built
TEACHER = "teacher"  # where one is fine-tuned


@dataclass
class RunResult:
    """What a run made: the stages in order, the metrics, and the release if the gate passed."""

    out: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    release: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as plain values, for ``--json``."""
        return {
            "out": str(self.out),
            "stages": self.stages,
            "models": self.metrics["models"],
            "partition": self.metrics["partition"],
            "gate": self.metrics["gate"],
            "on_policy": self.metrics.get("on_policy"),
            "report": str(self.out / "evaluation" / "report.html"),
            "release": None if self.release is None else str(self.release),
        }


def run(recipe: Recipe, out: Path) -> RunResult:
    """Run the recipe's stages in ``out``, resuming what an earlier run left there.

    The result's ``release`` is None when the gate failed: the evaluation is finished then, and
    nothing is released.

    Raises ``InputError`` before any work if ``out`` belongs to another recipe or something the
    recipe needs is not on this machine.
    """
    with claimed(recipe, out):
        return _run(recipe, out)


def with_own_teacher(recipe: Recipe, out: Path) -> Recipe:
    """The recipe, its teacher built in ``out`` first if it has a recipe of its own."""
    if recipe.teacher.foundation is not None:
        from seodang.foundation.build import build_teacher
        from seodang.foundation.recipe import load_foundation_recipe

        file = Path(recipe.teacher.foundation)
        build_teacher(load_foundation_recipe(file), file.parent, out / FOUNDATION)
    return recipe.model_copy(update={"teacher": own_teacher(recipe.teacher, out)})


def own_teacher(config: TeacherConfig, out: Path) -> TeacherConfig:
    """The teacher that was built in ``out``, as a directory; another teacher as it is."""
    if config.foundation is None:
        return config
    built = {"path": str(out / FOUNDATION / "teacher"), "foundation": None}
    return config.model_copy(update=built)


def labelling_teacher(config: TeacherConfig, out: Path) -> TeacherConfig:
    """The teacher that labels, as a directory: the one that was fine-tuned in ``out``, if any."""
    if config.fine_tuning is None:
        return own_teacher(config, out)
    return TeacherConfig(
        path=str(out / TEACHER), license=config.license, precision=config.precision
    )


def _run(recipe: Recipe, out: Path) -> RunResult:
    _check_needs(recipe)
    recipe = with_own_teacher(recipe, out)
    from seodang.corpus.build import read_sequences
    from seodang.evaluation.evaluate import METRICS, evaluate
    from seodang.release import bundle
    from seodang.release.keys import find_or_make_keys
    from seodang.softlabels.capture import capture
    from seodang.softlabels.store import SoftLabelStore
    from seodang.student.on_policy import improve
    from seodang.student.train import train
    from seodang.teacher import open_teacher

    result = RunResult(out)
    stage = Stages(out)
    result.stages = stage.done
    made = prepare(recipe, stage)
    corpus, teacher, sources = made.corpus, made.teacher, made.sources
    labeller = labelling_teacher(recipe.teacher, out)

    def make_labels(path: Path) -> Artifact:
        return capture(
            open_teacher(labeller),
            read_sequences(corpus.path, "train"),
            recipe.soft_labels,
            path,
            sources=sources,
        )

    labels = stage("soft-labels", make_labels)
    store = SoftLabelStore(labels)
    student = stage(
        "student", lambda path: train(store, teacher, recipe.student, path, sources=sources)
    )
    baseline = stage(
        "cross-entropy",
        lambda path: train(
            store,
            teacher,
            recipe.student,
            path,
            objective="cross-entropy",
            same_start_as=student,
            documents=made.without_answers,
            sources=sources,
        ),
    )
    after_on_policy: Artifact | None = None
    if recipe.student.on_policy is not None:
        after_on_policy = stage(
            "on-policy",
            lambda path: improve(
                student,
                open_teacher(labeller),
                teacher,
                corpus,
                recipe.student,
                path,
                sources=sources,
            ),
        )
    evaluation = stage(
        "evaluation",
        lambda path: evaluate(
            recipe,
            teacher,
            corpus,
            labels,
            student,
            baseline,
            path,
            after_on_policy=after_on_policy,
            scorer=open_teacher(labeller) if after_on_policy else None,
        ),
    )
    result.metrics = json.loads((evaluation.path / METRICS).read_text())
    kept = student
    if after_on_policy is not None:
        say(f"on-policy stage {result.metrics['on_policy']['reason']}")
        kept = after_on_policy if result.metrics["on_policy"]["kept"] else student
    if not result.metrics["gate"]["passed"]:
        _set_aside(out / "release")
        return result
    key, _ = find_or_make_keys(out)
    released = stage(
        "release",
        lambda path: bundle.build(
            path,
            config=recipe.release,
            student=kept,
            evaluation=evaluation,
            corpus=corpus,
            soft_labels=labels,
            key=key,
            schemas={
                task.name: json.loads(Path(task.json_schema).read_bytes())
                for task in recipe.tasks
                if task.json_schema is not None
            },
        ),
    )
    result.release = released.path
    say_if_nothing_ran(stage.done)
    return result


@dataclass(frozen=True)
class Prepared:
    """What soft labels are made of.

    ``without_answers``: ids of the training documents that the teacher did not write, if there are
    others.
    """

    corpus: Artifact
    teacher: Path
    sources: list[Source]
    without_answers: frozenset[str] | None = None


def prepare(recipe: Recipe, stage: Stages) -> Prepared:
    """The corpus; the teacher, fine-tuned on it if it shall be; and what it answers to requests.

    Raises ``InputError`` before any work if a file of the tasks is wrong anywhere.
    """
    from seodang.causal_lm import load_tokenizer, tokenizer_fingerprint
    from seodang.corpus.build import build, read_documents
    from seodang.corpus.tasks import read_requests
    from seodang.evaluation.tasks import load_task
    from seodang.student.fine_tuning import fine_tune
    from seodang.teacher.local import teacher_directory, teacher_source
    from seodang.teacher_answers import answer_requests, with_answers

    for task in recipe.tasks:
        load_task(task)
        if task.requests is not None:
            read_requests(Path(task.requests), task.kind, task.languages)
    teacher = teacher_directory(recipe.teacher)
    tokenizer = load_tokenizer(teacher)
    fingerprint = tokenizer_fingerprint(tokenizer)
    made = partial(build, recipe.corpus, tokenizer, fingerprint, tasks=recipe.tasks)
    corpus = stage("corpus", made)
    sources = [*corpus.manifest.sources, teacher_source(recipe.teacher)]
    if (tuning := recipe.teacher.fine_tuning) is not None:
        tune = partial(fine_tune, teacher, corpus, tuning, sources=sources)
        teacher = stage(TEACHER, tune).path
    asked = [task for task in recipe.tasks if task.requests is not None]
    if not asked:
        return Prepared(corpus, teacher, sources)
    labeller = labelling_teacher(recipe.teacher, stage.out)
    near_duplicate = recipe.corpus.near_duplicate
    ask = partial(answer_requests, labeller, teacher, asked, near_duplicate, sources=sources)
    answers = stage("answers", ask)
    add = partial(with_answers, corpus, answers, asked, recipe.corpus, tokenizer)
    corpus = stage("corpus-with-answers", add)
    documents = read_documents(corpus.path, "train")
    by_hand = frozenset(d["id"] for d in documents if not d.get("written_by_teacher"))
    return Prepared(corpus, teacher, [*corpus.manifest.sources, sources[-1]], by_hand)


def distill(recipe: Recipe, out: Path) -> Artifact:
    """The student's stage alone, of a run whose soft labels are finished.

    Started by torchrun, its processes train the one student together; ``run`` finds it finished
    then. Raises ``InputError`` if ``out`` holds no soft labels.
    """
    from seodang.softlabels.store import open as open_store
    from seodang.student.train import train
    from seodang.teacher.local import teacher_directory
    from seodang.training.parallel import is_first_process

    if not (out / "soft-labels" / MANIFEST).exists():
        raise InputError(
            f"{out / 'soft-labels'}: no finished soft labels; make them first with `seodang run`, "
            "which may be stopped once they are there"
        )
    store = open_store(out / "soft-labels")
    with claimed(recipe, out) if is_first_process() else nullcontext():
        return train(
            store,
            teacher_directory(labelling_teacher(recipe.teacher, out)),
            recipe.student,
            out / "student",
            sources=store.artifact.manifest.sources,
        )


def _check_needs(recipe: Recipe) -> None:
    """Refuse to start what could not be ended: packages, converter and engine must be here."""
    from seodang.evaluation.gate import read_metrics
    from seodang.packages import open_package
    from seodang.release.engine import check_engine
    from seodang.release.gguf import check_converter

    for pin in recipe.packages():
        open_package(pin).close()
    if recipe.gate.previous is not None:
        read_metrics(Path(recipe.gate.previous))
    if recipe.release.quantizations:
        check_converter()
        check_engine()


def _set_aside(release: Path) -> None:
    """An earlier student's release must not pass for one of the student that failed the gate."""
    if release.exists():
        import shutil

        target = release.with_name("release.superseded")
        shutil.rmtree(target, ignore_errors=True)
        release.rename(target)
        say(f"The release of an earlier student was moved to {target}")


def gate_failure(metrics: dict[str, Any]) -> WorkFailed:
    """The error that says which checks of the gate failed."""
    failed = [
        f"{c['name']}: {c['value']} must be {c['comparison']} {c['threshold']}"
        for c in metrics["gate"]["checks"]
        if not c["passed"]
    ]
    return WorkFailed("the gate failed, nothing is released:\n  " + "\n  ".join(failed))
