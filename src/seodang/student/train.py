"""Training a student from stored soft labels; the teacher is not in memory.

The loop is read from top to bottom: plan the batches, load the newest checkpoint, take steps,
save. Batches follow from the store and the seed alone, so a run that was killed continues to the
same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seodang.artifact import Artifact, Source, begin, write_atomically
from seodang.causal_lm import (
    default_device,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from seodang.errors import InputError, WorkFailed
from seodang.progress import say, track
from seodang.recipe import StudentConfig
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore, check_tokens
from seodang.student import checkpoint
from seodang.student.batch import Objective, batch_loss
from seodang.student.initialise import check_layers, choose_layers, depth_pruned

CHECKPOINTS = "checkpoints"
LOG = "training.jsonl"
START = "start.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def train(
    store: SoftLabelStore,
    teacher: Path,
    config: StudentConfig,
    out: Path,
    *,
    objective: Objective = "soft-labels",
    layers: Sequence[int] | None = None,
    sources: Sequence[Source] = (),
) -> Artifact:
    """Train a depth-pruned student of ``teacher`` on ``store``; resumes what ``out`` holds.

    ``objective`` "cross-entropy" trains the same start on the same batches by the observed tokens
    alone: the baseline that distillation must beat. ``layers`` of the teacher to keep; None
    chooses them by :func:`seodang.student.initialise.choose_layers`.

    Raises ``InputError`` if the store was made with another tokenizer or its tokens were changed,
    ``WorkFailed`` if the loss stops being finite.
    """
    tokenizer = load_tokenizer(teacher)
    store.check_tokenizer(tokenizer_fingerprint(tokenizer))
    inputs = {"soft_labels": store.artifact.digest, "start": model_fingerprint(teacher)}
    used = {**config.model_dump(exclude={"checkpoint_steps"}), "objective": objective}
    if layers is not None:
        used["kept_layers"] = list(layers)
    check_layers(teacher, config.layers or 1)
    draft = begin(out, "student", used, inputs)
    if isinstance(draft, Artifact):
        return draft

    if problems := store.artifact.verify():
        raise InputError(f"{store.path}: " + "; ".join(problems))
    batches = plan_batches(store.lengths.tolist(), config.batch_tokens, config.epochs, config.seed)

    start = draft.path / START
    if not start.exists():
        kept = choose_layers(teacher, store, config.layers or 1) if layers is None else list(layers)
        write_atomically(start, json.dumps({"kept_layers": kept}).encode() + b"\n")
    kept = json.loads(start.read_bytes())["kept_layers"]
    device = default_device()
    torch.manual_seed(config.seed)
    model = depth_pruned(teacher, kept).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    checkpoints = draft.path / CHECKPOINTS
    step = checkpoint.load(checkpoints, model, optimizer)
    log = draft.path / LOG
    keep_lines(log, step)
    if step:
        say(f"Continuing from step {step} of {len(batches)}")

    tokens = [int(store.labelled_counts[batch].sum()) for batch in batches]
    residual = store.estimator == "residual"
    name = "Training the student" if objective == "soft-labels" else "Training the baseline"
    with (
        log.open("a") as lines,
        stop_on_interrupt() as stopping,
        track(name, sum(tokens), "tok", sum(tokens[:step])) as advance,
    ):
        while step < len(batches):
            batch = [checked(store, i) for i in batches[step]]
            rate = config.learning_rate * schedule(step, len(batches), config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            terms = batch_loss(model, batch, objective, config.cross_entropy_weight, residual)
            terms.total.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            if not math.isfinite(float(terms.total.detach())) or not math.isfinite(float(norm)):
                documents = ", ".join(sorted({s.document_id for s in batch}))
                raise WorkFailed(
                    f"step {step}: the loss is not finite; documents of the batch: {documents}. "
                    "Lower student.learning_rate, or look at these documents"
                )
            optimizer.step()
            step += 1
            row = {
                "step": step,
                "tokens": tokens[step - 1],
                "loss": float(terms.total.detach()),
                "kd_loss": float(terms.distillation),
                "cross_entropy": float(terms.cross_entropy),
                "learning_rate": rate,
                "gradient_norm": float(norm),
            }
            lines.write(json.dumps(row) + "\n")
            advance(tokens[step - 1], f"loss {row['loss']:.3f}")
            if step % config.checkpoint_steps == 0 or stopping.is_set():
                lines.flush()
                os.fsync(lines.fileno())
                checkpoint.save(checkpoints, step, model, optimizer)
            if stopping.is_set():
                raise KeyboardInterrupt

    model.to("cpu").save_pretrained(draft.path)
    for file in TOKENIZER_FILES:
        if (teacher / file).is_file():
            shutil.copyfile(teacher / file, draft.path / file)
    summary = {
        "kept_layers": kept,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": len(batches),
        "tokens": sum(tokens),
    }
    return draft.finish(sources=sources, summary=summary, temporary=[CHECKPOINTS])


def checked(store: SoftLabelStore, index: int) -> SoftLabelSequence:
    """A sequence whose labels belong to its tokens; raises ``InputError`` if they do not."""
    sequence = store[index]
    if problem := check_tokens(sequence):
        raise InputError(f"{store.path}: document {sequence.document_id}: {problem}")
    return sequence


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, epochs: int, seed: int
) -> list[list[int]]:
    """Indices of the sequences of every step, from the lengths and the seed alone.

    Each epoch shuffles the sequences, sorts runs of them by length so that little is padded, cuts
    them into batches of at most ``batch_tokens`` padded tokens, and shuffles the batches.
    """
    steps: list[list[int]] = []
    for epoch in range(epochs):
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(len(lengths)).tolist()
        mean = max(1, sum(lengths) // max(1, len(lengths)))
        run = 16 * max(1, batch_tokens // mean)
        batches: list[list[int]] = []
        for start in range(0, len(order), run):
            batches.append([])
            for index in sorted(order[start : start + run], key=lambda i: (lengths[i], i)):
                if batches[-1] and (len(batches[-1]) + 1) * lengths[index] > batch_tokens:
                    batches.append([])
                batches[-1].append(index)
        steps += [batches[i] for i in generator.permutation(len(batches))]
    return steps


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to a tenth."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    progress = (step - rise) / max(1, steps - rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def keep_lines(log: Path, count: int) -> None:
    """Cut the log back to the steps that the checkpoint holds."""
    if log.exists():
        lines = log.read_text().splitlines(keepends=True)[:count]
        log.write_text("".join(lines))


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that the step in hand is finished and saved."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
