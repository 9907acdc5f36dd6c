"""Training a teacher on the answers of a corpus, by the observed tokens alone.

    teacher = fine_tune(directory, corpus, recipe.teacher.fine_tuning, Path("runs/cs/teacher"))

A teacher that knows its task labels it better. What it becomes is a Hugging Face directory with the
tokenizer that it had, so that the corpus stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seodang.artifact import Artifact, Source, begin
from seodang.causal_lm import CausalLM, copy_tokenizer, model_fingerprint
from seodang.corpus.build import read_sequences
from seodang.recipe import StudentConfig, TeacherTuningConfig
from seodang.student.distillation import (
    Distillation,
    make_optimizer,
    make_trainable,
    plan_packs,
)
from seodang.student.packing import Pack, pack
from seodang.training.log import EVENTS, SPEED
from seodang.training.loop import CHECKPOINTS, run
from seodang.training.parallel import join
from seodang.training.plan import plan_steps

_NOT_IDENTITY = {"checkpoint_steps", "keep_checkpoints"}


def fine_tune(
    teacher: Path,
    corpus: Artifact,
    config: TeacherTuningConfig,
    out: Path,
    *,
    sources: Sequence[Source] = (),
) -> Artifact:
    """Train the model in ``teacher`` on the train side of ``corpus``; resumes what ``out`` holds.

    Raises ``InputError`` if the model cannot be loaded or trained in packs, and ``WorkFailed`` if
    the loss stops being finite.
    """
    inputs = {"teacher": model_fingerprint(teacher), "corpus": corpus.digest}
    draft = begin(out, "teacher", config.model_dump(exclude=_NOT_IDENTITY), inputs)
    if isinstance(draft, Artifact):
        return draft
    sequences = read_sequences(corpus.path, "train")
    lengths = [len(sequence.token_ids) for sequence in sequences]
    labelled = [len(sequence.labelled) for sequence in sequences]
    steps = plan_steps(lengths, config.batch_tokens, config.epochs, config.seed)
    with join() as processes:
        model: Any = CausalLM.load(teacher, torch.device("cpu")).model
        model = model.to(processes.device).train()
        make_trainable(model, config)
        module = Distillation(model, StudentConfig(), "cross-entropy", residual=False)
        module.accumulate_head_gradient = True

        def packed(members: Sequence[int]) -> Pack:
            return pack([sequences[index] for index in members], "cross-entropy")

        plan = plan_packs(steps, lengths, labelled, packed, config, processes)
        optimizers = [make_optimizer(module, config)]
        run("Fine-tuning the teacher", module, plan, config, optimizers, out, processes)
        model.to("cpu").save_pretrained(out)
    copy_tokenizer(teacher, out)
    summary = {"steps": len(steps), "tokens": sum(plan.tokens), "labelled": sum(plan.labelled)}
    return draft.finish(
        sources=sources, summary=summary, measured=[SPEED, EVENTS], temporary=[CHECKPOINTS]
    )
