"""A sweep: several students from one capture, compared in one table and plot.

    seodang sweep recipe.yaml --out sweeps/sizes --vary student.layers=6,10,16

The recipe gives everything that is not varied. All students share one corpus and one pass over
the teacher, whichever soft labels each of them learns from; each is an artifact, so that a sweep
that was stopped continues where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.artifact import MANIFEST, Artifact, begin, sha256_file, write_atomically, write_json
from seodang.errors import InputError, WorkFailed
from seodang.pipeline import labelling_teacher, prepare, with_own_teacher
from seodang.progress import say
from seodang.recipe import Recipe, SoftLabelsConfig
from seodang.stages import Stages, claimed
from seodang.sweep_grid import Variant, grid

if TYPE_CHECKING:
    from seodang.corpus.sequences import TokenSequence

TABLE = "sweep.json"
REPORT = "sweep.html"
CAPTURE_SPEED = "speed.json"  # beside the stores
EVALUATED_BYTES = 4 * 2**30  # of the students that are measured in one pass over the teacher


@dataclass
class SweepResult:
    """What a sweep made: a row for every student, and what one capture saved."""

    out: Path
    rows: list[dict[str, Any]]
    economics: dict[str, Any] | None
    ran: bool

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The rows of the students whose training failed."""
        return [row for row in self.rows if row["error"] is not None]

    def to_json(self) -> dict[str, Any]:
        """The result as plain values, for ``--json``."""
        return {
            "out": str(self.out),
            "ran": self.ran,
            "students": self.rows,
            "economics": self.economics,
            "table": str(self.out / "sweep" / TABLE),
            "report": str(self.out / "sweep" / REPORT),
        }


def sweep(recipe_file: Path, settings: list[str], vary: list[str], out: Path) -> SweepResult:
    """Train and compare a student for every combination of what ``vary`` lists, in ``out``.

    ``settings`` are overrides ``section.key=value`` for all of them; an item of ``vary`` is
    ``section.key=value,value,...``. A student whose training fails is a row with an ``error``.

    Raises ``InputError`` before any work if a combination is not a valid recipe, or ``out``
    belongs to something else.
    """
    variants = grid(recipe_file, settings, vary)
    # The same recipe may be run elsewhere: a sweep's directory is not a run's.
    owner = variants[0].recipe
    owner = owner.model_copy(update={"name": f"{owner.name}, a sweep"})
    with claimed(owner, out, "sweep"):
        return _sweep(variants, out)


def sweep_failure(result: SweepResult) -> WorkFailed:
    """The error that says which students could not be trained."""
    lines = [f"{row['name']}: {row['error']}" for row in result.failed]
    return WorkFailed(
        f"{len(lines)} of {len(result.rows)} students could not be trained:\n  "
        + "\n  ".join(lines)
    )


def _sweep(variants: list[Variant], out: Path) -> SweepResult:
    from seodang.causal_lm import model_fingerprint
    from seodang.corpus.build import read_sequences
    from seodang.packages import open_package
    from seodang.softlabels.store import SoftLabelStore
    from seodang.student.start import check_start
    from seodang.student.train import train
    from seodang.teacher.local import teacher_directory

    recipe = variants[0].recipe
    for pin in recipe.packages():
        open_package(pin).close()
    recipe = with_own_teacher(recipe, out)
    teacher = teacher_directory(recipe.teacher)
    for variant in variants:
        check_start(teacher, variant.recipe.student)
    if any(variant.recipe.student.on_policy for variant in variants):
        say(
            "The on-policy stage of the recipe is left out: a sweep trains from stored labels alone"
        )
    made = prepare(recipe, Stages(out))
    corpus, teacher, sources = made.corpus, made.teacher, made.sources
    recipe = recipe.model_copy(update={"teacher": labelling_teacher(recipe.teacher, out)})
    labels = _capture(
        recipe,
        read_sequences(corpus.path, "train"),
        {variant.labels: variant.recipe.soft_labels for variant in variants},
        out / "soft-labels",
        corpus,
        sources,
    )
    students: dict[str, Artifact] = {}
    errors: dict[str, str] = {}
    for number, variant in enumerate(variants, 1):
        store = SoftLabelStore(labels[variant.labels])
        path = out / "students" / variant.name
        if not (path / MANIFEST).exists():
            say(f"Student {number} of {len(variants)}: {variant.name}")
        try:
            students[variant.name] = train(
                store, teacher, variant.recipe.student, path, sources=sources
            )
        except WorkFailed as error:
            errors[variant.name] = str(error)
            say(f"could not be trained: {error}")

    inputs = {"teacher": model_fingerprint(teacher), "corpus": corpus.digest}
    inputs |= {f"soft-labels/{name}": artifact.digest for name, artifact in labels.items()}
    inputs |= {f"students/{name}": artifact.digest for name, artifact in students.items()}
    config = {"varied": {variant.name: variant.varied for variant in variants}, "errors": errors}
    draft = begin(out / "sweep", "sweep", config, inputs)
    if isinstance(draft, Artifact):
        say("Nothing to do: no input and no key of the sweep changed since the last time.")
        found = json.loads((draft.path / TABLE).read_bytes())
        return SweepResult(out, found["students"], found["economics"], ran=False)

    from seodang.sweep_report import economics, mark_fronts, render

    held_out = read_sequences(corpus.path, "held_out")
    figures = _evaluate(teacher, students, held_out, recipe, errors)
    rows = [
        _row(variant, labels[variant.labels], students, errors, figures) for variant in variants
    ]
    mark_fronts(rows)
    spent = _read_speed(out / "soft-labels", corpus)
    saved = None
    if spent["tokens"] and "teacher" in figures:
        saved = economics(
            capture=spent,
            corpus=corpus.manifest.summary,
            teacher=figures["teacher"],
            label_bytes=sum(_size(artifact) for artifact in labels.values()),
            rows=rows,
        )
    write_json(draft.path / TABLE, {"students": rows, "economics": saved})
    page = render(recipe.name, rows, saved)
    write_atomically(draft.path / REPORT, page.encode())
    summary = {"students": len(rows), "failed": len(errors)}
    draft.finish(sources=sources, summary=summary, measured=[TABLE, REPORT])
    return SweepResult(out, rows, saved, ran=True)


def _capture(
    recipe: Recipe,
    sequences: Sequence[TokenSequence],
    configs: Mapping[str, SoftLabelsConfig],
    out: Path,
    corpus: Artifact,
    sources: Sequence[Any],
) -> dict[str, Artifact]:
    """The soft labels of every config, by its name, from one pass over the teacher.

    The time that the pass takes is kept in ``out`` after every shard: a resumed sweep knows it.
    """
    from seodang.softlabels.capture import capture_each
    from seodang.teacher import open_teacher
    from seodang.teacher.local import LocalTeacher

    teacher = open_teacher(recipe.teacher)
    stores = {out / name: config for name, config in configs.items()}
    if isinstance(teacher, LocalTeacher) and not all((path / MANIFEST).exists() for path in stores):
        teacher.model  # noqa: B018 (loaded before the clock starts)
    spent = _read_speed(out, corpus)
    began = time.perf_counter()

    def shard_made(tokens: int) -> None:
        nonlocal began
        now = time.perf_counter()
        spent["tokens"] += tokens
        spent["seconds"] += now - began
        began = now
        write_json(out / CAPTURE_SPEED, spent)

    made = capture_each(teacher, sequences, stores, sources=sources, shard_made=shard_made)
    return dict(zip(configs, made, strict=True))


def _read_speed(stores: Path, corpus: Artifact) -> dict[str, Any]:
    """What the teacher has labelled of this corpus, in how many seconds: zeros at first."""
    try:
        spent = json.loads((stores / CAPTURE_SPEED).read_bytes())
    except FileNotFoundError:
        spent = {}
    if spent.get("corpus") != corpus.digest:
        return {"corpus": corpus.digest, "tokens": 0, "seconds": 0.0}
    assert isinstance(spent, dict)
    return spent


def _size(artifact: Artifact) -> int:
    return sum(entry.size for entry in artifact.manifest.files)


def _evaluate(
    teacher: Path,
    students: Mapping[str, Artifact],
    sequences: Sequence[TokenSequence],
    recipe: Recipe,
    errors: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """The figures of teacher and students on held-out text, by name.

    A student that cannot be measured has none, but an entry in ``errors``.

    Students of one trimmed vocabulary and those of the teacher's are measured over the same
    categories (``partition`` says which); with several trimmed ones each is measured over its own.
    As many students are loaded at a time as fit into ``EVALUATED_BYTES``; each such group is one
    pass over the teacher, whose own figures are those of the first.
    """
    from seodang.causal_lm import CausalLM
    from seodang.evaluation.fidelity import measure, partition
    from seodang.student.train import vocabulary_of
    from seodang.student.trimmed import VOCABULARY

    figures: dict[str, dict[str, Any]] = {}
    if not students:
        return figures
    files = {name: student.path / VOCABULARY for name, student in students.items()}
    digests = {name: sha256_file(file) for name, file in files.items() if file.exists()}
    families = {name: digests.get(name) for name in students}
    if len(set(digests.values())) == 1:
        families = dict.fromkeys(students, next(iter(digests.values())))
    reference = CausalLM.load(teacher)
    for family in dict.fromkeys(families.values()):
        members = {name: students[name] for name in students if families[name] == family}
        vocabulary = next(
            (vocabulary_of(students[name].path) for name in members if name in digests), None
        )
        waiting = list(_groups(members))
        while waiting:
            group = waiting.pop(0)
            try:
                models = {name: CausalLM.load(students[name].path) for name in group}
                bins = recipe.evaluation.calibration_bins
                found, _ = measure(reference, models, sequences, bins, vocabulary)
            except (InputError, WorkFailed) as error:
                if len(group) == 1:
                    errors[group[0]] = f"trained, but it cannot be measured: {error}"
                else:  # one of them is broken: which?
                    waiting += [[name] for name in group]
                continue
            for name in group:
                found[name]["partition"] = partition(reference, vocabulary)
            figures = {**found, **figures}
    return figures


def _groups(students: Mapping[str, Artifact]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, artifact in students.items():
        if group and size + _size(artifact) > EVALUATED_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += _size(artifact)
    yield group


def _row(
    variant: Variant,
    labels: Artifact,
    students: Mapping[str, Artifact],
    errors: Mapping[str, str],
    figures: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """A student's row of the table; without figures if it could not be trained."""
    from seodang.training.log import SPEED, read_rows

    name, summary = variant.name, labels.manifest.summary
    row: dict[str, Any] = {
        "name": name,
        "varied": variant.varied,
        "error": errors.get(name),
        "soft_labels": variant.labels,
        "label_bytes_per_token": _size(labels) / summary["tokens"],
        "epochs": variant.recipe.student.epochs,
    }
    if name not in figures:
        return row
    student = students[name]
    tokens = student.manifest.summary["tokens"]
    seconds = sum(step["seconds"] for step in read_rows(student.path / SPEED))
    return row | {
        "digest": student.digest,
        **figures[name],
        "training_tokens": tokens,
        "training_seconds": seconds,
        "training_tokens_per_second": tokens / seconds,
    }
