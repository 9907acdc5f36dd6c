"""Training a student from stored soft labels; the teacher is not in memory.

The stage is read from top to bottom: check that labels and start belong together, decide the
start and the vocabulary, plan the steps, run the loop, save. What was decided is written down
first, so that a run that was killed goes on with it, and a baseline can start from the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seodang.artifact import (
    Artifact,
    Draft,
    Source,
    begin,
    canonical_json,
    new_sources,
    sha256_bytes,
    sha256_file,
    write_json,
)
from seodang.causal_lm import (
    CausalLM,
    copy_tokenizer,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from seodang.errors import InputError
from seodang.recipe import StudentConfig
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore, check_tokens
from seodang.student.distillation import (
    Distillation,
    make_optimizer,
    make_trainable,
    plan_packs,
)
from seodang.student.packing import Objective, Pack, pack
from seodang.student.start import (
    build_start,
    check_start,
    choose_start,
    start_directory,
    start_sources,
)
from seodang.student.vocabulary import (
    VOCABULARY,
    TrimmedVocabulary,
    choose_vocabulary,
    trim_model,
    trim_sequence,
    trim_tokenizer,
    trimmed_lengths,
    trimming_report,
)
from seodang.training.log import EVENTS, SPEED
from seodang.training.loop import CHECKPOINTS, run
from seodang.training.parallel import Processes, join, whole_state
from seodang.training.plan import plan_steps

START = "start.json"
# Keys that change nothing of the student: where it starts is told by fingerprint, not by path.
_NOT_IDENTITY = {"path", "checkpoint_steps", "keep_checkpoints", "on_policy"}


def train(
    store: SoftLabelStore,
    teacher: Path,
    config: StudentConfig,
    out: Path,
    *,
    objective: Objective = "soft-labels",
    same_start_as: Artifact | None = None,
    continue_from: Artifact | None = None,
    documents: frozenset[str] | None = None,
    sources: Sequence[Source] = (),
) -> Artifact:
    """Train a student on ``store``; resumes what ``out`` holds.

    The labels are in the vocabulary of the model in ``teacher``, the student's may be smaller.
    ``objective`` "cross-entropy" trains on the same batches by the observed tokens alone: the
    baseline that distillation must beat, from the ``same_start_as`` the student. ``continue_from``
    goes on from a finished student's weights, in its vocabulary, instead of the recipe's start.
    With ``documents`` (ids) it sees no others, but these more often: in as many steps as all take.

    Started by torchrun, all its processes train the one student.

    Raises ``InputError`` if the store was made with another tokenizer, its tokens were changed,
    or the start is impossible, and ``WorkFailed`` if the loss stops being finite.
    """
    job = _Job(store, teacher, config, out, objective, same_start_as, continue_from, documents)
    with join() as processes:
        draft: Draft | Artifact | None = None
        if processes.first:
            draft = _begin(job)
        (finished,) = processes.add([float(isinstance(draft, Artifact))])
        if finished:
            return draft if isinstance(draft, Artifact) else Artifact.open(out, "student")
        if isinstance(draft, Draft) and not (out / START).exists():
            _decide(job)
        processes.wait()
        _fit(job, processes)
        if isinstance(draft, Draft):
            draft.finish(
                sources=[*sources, *new_sources(start_sources(config), sources)],
                summary=json.loads((out / START).read_bytes())["summary"],
                measured=[SPEED, EVENTS],
                temporary=[CHECKPOINTS],
            )
        processes.wait()
        return Artifact.open(out, "student")


@dataclass(frozen=True)
class _Job:
    """What :func:`train` was asked for."""

    store: SoftLabelStore
    teacher: Path
    config: StudentConfig
    out: Path
    objective: Objective
    same_start_as: Artifact | None
    continue_from: Artifact | None
    documents: frozenset[str] | None

    def start(self) -> Any:
        """The model to train, once it was decided on."""
        if self.continue_from is not None:
            return CausalLM.load(self.continue_from.path, torch.device("cpu")).model
        return untrained(self.out, self.teacher, self.config)


def _begin(job: _Job) -> Draft | Artifact:
    """Check what can be checked before any work, and open ``out``."""
    store, config = job.store, job.config
    store.check_tokenizer(tokenizer_fingerprint(load_tokenizer(job.teacher)))
    if config.divergence != "forward-kl" and store.estimator not in ("residual", "top-k"):
        raise InputError(
            f"student.divergence {config.divergence} needs the teacher's probabilities of the "
            f"stored ids, which {store.estimator} labels do not hold: set soft_labels.estimator "
            "to residual"
        )
    inputs = {"soft_labels": store.artifact.digest}
    if job.continue_from is not None:
        inputs["continue_from"] = job.continue_from.digest
    else:
        check_start(job.teacher, config)
        inputs["start"] = model_fingerprint(start_directory(job.teacher, config))
    if job.documents is not None:
        inputs["documents"] = sha256_bytes(canonical_json(sorted(job.documents)))
    if job.same_start_as is not None:
        for name in (START, VOCABULARY):
            if (job.same_start_as.path / name).exists():
                inputs[name] = sha256_file(job.same_start_as.path / name)
    used = {**config.model_dump(exclude=_NOT_IDENTITY), "objective": job.objective}
    draft = begin(job.out, "student", used, inputs)
    if isinstance(draft, Draft) and (problems := store.artifact.verify()):
        raise InputError(f"{store.path}: " + "; ".join(problems))
    return draft


def _decide(job: _Job) -> None:
    """Write down the start, the vocabulary and the tokenizer."""
    store, teacher, out = job.store, job.teacher, job.out
    given = job.same_start_as or job.continue_from
    vocabulary = None
    if given is not None and (given.path / VOCABULARY).exists():
        vocabulary = TrimmedVocabulary.load(given.path / VOCABULARY)
    elif given is None and job.config.vocabulary is not None:
        vocabulary = choose_vocabulary(teacher, store, job.config.vocabulary)
    if vocabulary is not None:
        vocabulary.save(out / VOCABULARY)
        trim_tokenizer(teacher, vocabulary, out)
    else:
        copy_tokenizer(teacher, out)
    if job.same_start_as is not None:
        choice = json.loads((job.same_start_as.path / START).read_bytes())["choice"]
    elif job.continue_from is not None:
        choice = {}
    else:
        choice = choose_start(teacher, store, job.config)
    steps, lengths, labelled = _steps(job, vocabulary)
    used = [index for step in steps for index in step]
    summary: dict[str, Any] = {
        "steps": len(steps),
        "tokens": sum(lengths[index] for index in used),
        "labelled": sum(labelled[index] for index in used),
    }
    if vocabulary is not None:
        summary["vocabulary"] = trimming_report(store, vocabulary)
    write_json(out / START, {"choice": choice, "summary": summary})


def _steps(
    job: _Job, vocabulary: TrimmedVocabulary | None
) -> tuple[list[list[int]], list[int], list[int]]:
    """The sequences of every step; tokens and labelled positions of every sequence."""
    store, config = job.store, job.config
    if vocabulary is None:
        lengths, labelled = store.lengths, store.labelled_counts
    else:
        lengths, labelled = trimmed_lengths(store, vocabulary)
    steps = plan_steps(lengths.tolist(), config.batch_tokens, config.epochs, config.seed)
    if job.documents is not None:
        kept = [index for index, name in enumerate(store.document_ids) if name in job.documents]
        if not kept:
            raise InputError(
                f"{store.path}: no document that the baseline could learn from: the teacher "
                "answered all of them; give a task a `train` file, or the corpus a source"
            )
        often = math.ceil(config.epochs * lengths.sum() / lengths[kept].sum()) + 1
        some = plan_steps(lengths[kept].tolist(), config.batch_tokens, often, config.seed)
        steps = [[kept[place] for place in step] for step in some[: len(steps)]]
    return steps, lengths.tolist(), labelled.tolist()


def _fit(job: _Job, processes: Processes) -> None:
    """Train the student that was decided on, and write its weights."""
    store, config, out = job.store, job.config, job.out
    vocabulary = vocabulary_of(out)

    model = job.start().to(processes.device).train()
    make_trainable(model, config)
    module = Distillation(model, config, job.objective, store.estimator == "residual")
    module.accumulate_head_gradient = processes.count == 1  # FSDP looks for it where autograd ends
    processes.shard(module, list(model.base_model.layers))

    steps, lengths, labelled = _steps(job, vocabulary)

    def packed(members: Sequence[int]) -> Pack:
        return pack([checked(store, index, vocabulary) for index in members], job.objective)

    plan = plan_packs(steps, lengths, labelled, packed, config, processes)
    name = "Training the student" if job.objective == "soft-labels" else "Training the baseline"
    run(name, module, plan, config, [make_optimizer(module, config)], out, processes)

    if processes.count > 1:
        state = whole_state(model)
        if processes.first:
            model = job.start()
            model.load_state_dict(state)
    if processes.first:
        model.to("cpu").save_pretrained(out)


def checked(
    store: SoftLabelStore, index: int, vocabulary: TrimmedVocabulary | None = None
) -> SoftLabelSequence:
    """A sequence whose labels belong to its tokens, in the student's vocabulary.

    Raises ``InputError`` if they do not.
    """
    sequence = store[index]
    if problem := check_tokens(sequence):
        raise InputError(f"{store.path}: document {sequence.document_id}: {problem}")
    return sequence if vocabulary is None else trim_sequence(sequence, vocabulary)


def vocabulary_of(student: Path) -> TrimmedVocabulary | None:
    """The trimmed vocabulary of a student, None if it has the teacher's."""
    file = student / VOCABULARY
    return TrimmedVocabulary.load(file) if file.exists() else None


def untrained(student: Path, teacher: Path, config: StudentConfig) -> Any:
    """The model that the student in ``student`` started from, in float32."""
    choice = json.loads((student / START).read_bytes())["choice"]
    model = build_start(teacher, config, choice)
    if vocabulary := vocabulary_of(student):
        trim_model(model, vocabulary)
    for weight in model.parameters():  # the whole file they are mapped from stays in memory else
        weight.data = weight.data.clone()
    return model
