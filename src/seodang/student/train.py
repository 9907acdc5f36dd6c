"""Training a student from stored soft labels; the teacher is not in memory.

The stage is read from top to bottom: check that labels and start belong together, decide the
start and the vocabulary, plan the steps, run the loop, save. What was decided is written down
first, so that a run that was killed goes on with it, and a baseline can start from the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from seodang.artifact import (
    Artifact,
    Draft,
    Source,
    begin,
    canonical_json,
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
from seodang.recipe import StudentConfig, TrainingConfig
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore, check_tokens
from seodang.student.divergences import sparse_divergence_terms
from seodang.student.losses import LossTerms, sparse_kd_terms
from seodang.student.packing import Objective, Pack, hidden_states, pack
from seodang.student.start import build_start, check_start, choose_start, start_directory
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
from seodang.training.attention import use_packed_attention
from seodang.training.gated_mlp import use_lean_mlps
from seodang.training.log import EVENTS, SPEED
from seodang.training.loop import CHECKPOINTS, Plan, run
from seodang.training.parallel import Processes, join, whole_state
from seodang.training.plan import plan_steps, share
from seodang.training.products import use_fast_products

START = "start.json"
CPU_PACK_TOKENS = 512  # activations of more add to the peak; products of fewer are slow
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
    with join() as processes:
        draft: Draft | Artifact | None = None
        if processes.first:
            draft = _begin(
                store, teacher, config, out, objective, same_start_as, continue_from, documents
            )
        (finished,) = processes.add([float(isinstance(draft, Artifact))])
        if finished:
            return draft if isinstance(draft, Artifact) else Artifact.open(out, "student")
        if isinstance(draft, Draft) and not (out / START).exists():
            _decide(store, teacher, config, out, same_start_as, continue_from, documents)
        processes.wait()
        _fit(store, teacher, config, out, objective, continue_from, documents, processes)
        if isinstance(draft, Draft):
            draft.finish(
                sources=sources,
                summary=json.loads((out / START).read_bytes())["summary"],
                measured=[SPEED, EVENTS],
                temporary=[CHECKPOINTS],
            )
        processes.wait()
        return Artifact.open(out, "student")


def _begin(
    store: SoftLabelStore,
    teacher: Path,
    config: StudentConfig,
    out: Path,
    objective: Objective,
    same_start_as: Artifact | None,
    continue_from: Artifact | None,
    documents: frozenset[str] | None,
) -> Draft | Artifact:
    """Check what can be checked before any work, and open ``out``."""
    store.check_tokenizer(tokenizer_fingerprint(load_tokenizer(teacher)))
    if config.divergence != "forward-kl" and store.estimator not in ("residual", "top-k"):
        raise InputError(
            f"student.divergence {config.divergence} needs the teacher's probabilities of the "
            f"stored ids, which {store.estimator} labels do not hold: set soft_labels.estimator "
            "to residual"
        )
    inputs = {"soft_labels": store.artifact.digest}
    if continue_from is not None:
        inputs["continue_from"] = continue_from.digest
    else:
        check_start(teacher, config)
        inputs["start"] = model_fingerprint(start_directory(teacher, config))
    if documents is not None:
        inputs["documents"] = sha256_bytes(canonical_json(sorted(documents)))
    if same_start_as is not None:
        for name in (START, VOCABULARY):
            if (same_start_as.path / name).exists():
                inputs[name] = sha256_file(same_start_as.path / name)
    used = {**config.model_dump(exclude=_NOT_IDENTITY), "objective": objective}
    draft = begin(out, "student", used, inputs)
    if isinstance(draft, Draft) and (problems := store.artifact.verify()):
        raise InputError(f"{store.path}: " + "; ".join(problems))
    return draft


def _decide(
    store: SoftLabelStore,
    teacher: Path,
    config: StudentConfig,
    out: Path,
    same_start_as: Artifact | None,
    continue_from: Artifact | None,
    documents: frozenset[str] | None,
) -> None:
    """Write down the start, the vocabulary and the tokenizer."""
    given = same_start_as or continue_from
    vocabulary = None
    if given is not None and (given.path / VOCABULARY).exists():
        vocabulary = TrimmedVocabulary.load(given.path / VOCABULARY)
    elif given is None and config.vocabulary is not None:
        vocabulary = choose_vocabulary(teacher, store, config.vocabulary)
    if vocabulary is not None:
        vocabulary.save(out / VOCABULARY)
        trim_tokenizer(teacher, vocabulary, out)
    else:
        copy_tokenizer(teacher, out)
    if same_start_as is not None:
        choice = json.loads((same_start_as.path / START).read_bytes())["choice"]
    elif continue_from is not None:
        choice = {}
    else:
        choice = choose_start(teacher, store, config)
    steps, lengths, labelled = _steps(store, config, vocabulary, documents)
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
    store: SoftLabelStore,
    config: StudentConfig,
    vocabulary: TrimmedVocabulary | None,
    documents: frozenset[str] | None,
) -> tuple[list[list[int]], list[int], list[int]]:
    """The sequences of every step; tokens and labelled positions of every sequence."""
    if vocabulary is None:
        lengths, labelled = store.lengths, store.labelled_counts
    else:
        lengths, labelled = trimmed_lengths(store, vocabulary)
    steps = plan_steps(lengths.tolist(), config.batch_tokens, config.epochs, config.seed)
    if documents is not None:
        kept = [index for index, name in enumerate(store.document_ids) if name in documents]
        if not kept:
            raise InputError(
                f"{store.path}: no document that the baseline could learn from: the teacher "
                "answered all of them; give a task a `train` file, or the corpus a source"
            )
        often = math.ceil(config.epochs * lengths.sum() / lengths[kept].sum()) + 1
        some = plan_steps(lengths[kept].tolist(), config.batch_tokens, often, config.seed)
        steps = [[kept[place] for place in step] for step in some[: len(steps)]]
    return steps, lengths.tolist(), labelled.tolist()


def _fit(
    store: SoftLabelStore,
    teacher: Path,
    config: StudentConfig,
    out: Path,
    objective: Objective,
    continue_from: Artifact | None,
    documents: frozenset[str] | None,
    processes: Processes,
) -> None:
    """Train the student that was decided on, and write its weights."""
    vocabulary = vocabulary_of(out)

    def start() -> Any:
        if continue_from is not None:
            return CausalLM.load(continue_from.path, torch.device("cpu")).model
        return untrained(out, teacher, config)

    model = start().to(processes.device).train()
    make_trainable(model, config)
    module = Distillation(model, config, objective, store.estimator == "residual")
    module.accumulate_head_gradient = processes.count == 1  # FSDP looks for it where autograd ends
    processes.shard(module, list(model.base_model.layers))

    steps, lengths, labelled = _steps(store, config, vocabulary, documents)

    def packed(members: Sequence[int]) -> Pack:
        return pack([checked(store, index, vocabulary) for index in members], objective)

    plan = plan_packs(steps, lengths, labelled, packed, config, processes)
    name = "Training the student" if objective == "soft-labels" else "Training the baseline"
    run(name, module, plan, config, [make_optimizer(module, config)], out, processes)

    if processes.count > 1:
        state = whole_state(model)
        if processes.first:
            model = start()
            model.load_state_dict(state)
    if processes.first:
        model.to("cpu").save_pretrained(out)


def make_trainable(model: Any, config: TrainingConfig) -> None:
    """Let ``model`` take packs, and train faster and with less memory, in place.

    Raises ``InputError`` if its attention cannot be exchanged.
    """
    use_packed_attention(model)
    use_fast_products(model)
    use_lean_mlps(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def plan_packs(
    steps: Sequence[Sequence[int]],
    lengths: Sequence[int],
    labelled: Sequence[int],
    packed: Callable[[Sequence[int]], Pack],
    config: TrainingConfig,
    processes: Processes,
) -> Plan:
    """What the loop is told of ``steps``: this process' packs, made by ``packed`` when needed.

    ``lengths`` and ``labelled`` count tokens and labelled positions of every sequence.
    """
    on_cpu = processes.device.type == "cpu"
    at_once = config.micro_batch_tokens or (CPU_PACK_TOKENS if on_cpu else None)

    def packs(step: int) -> list[Pack]:
        shared = share(steps[step], lengths, processes.count, at_once)
        return [packed(members) for members in shared[processes.rank]]

    return Plan(
        tokens=[sum(lengths[index] for index in step) for step in steps],
        labelled=[sum(labelled[index] for index in step) for step in steps],
        packs=packs,
    )


def make_optimizer(module: torch.nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, as the config has it."""
    return torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


class Distillation(torch.nn.Module):
    """A student together with its loss: maps a pack to the scaled sums of the loss terms.

    The loss is computed inside, where the head's weights are whole, also if they are sharded. With
    ``accumulate_head_gradient`` a forward pass with gradients adds the head's to its ``grad``: a
    backward pass has to follow, from ``total`` as it is.
    """

    accumulate_head_gradient = False

    def __init__(
        self, model: Any, config: StudentConfig, objective: Objective, residual: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.divergence = config.divergence if objective == "soft-labels" else "forward-kl"
        self.cross_entropy_weight = (
            config.cross_entropy_weight if objective == "soft-labels" else 1.0
        )
        self.residual = residual and objective == "soft-labels"
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if embedding.weight is head.weight:  # rows that autograd adds to the head's gradient
            embedding.sparse = True

    def forward(self, batch: Pack, scale: float = 1.0) -> LossTerms:
        """Sums over the pack's labelled positions, in nats, times ``scale``."""
        hidden_NH = hidden_states(self.model, batch)
        head = self.model.get_output_embeddings()
        if torch.is_autocast_enabled(hidden_NH.device.type):
            hidden_NH = hidden_NH.to(torch.get_autocast_dtype(hidden_NH.device.type))
        labels = (batch.offsets, batch.entry_ids, batch.weights)
        options: dict[str, Any] = {
            "cross_entropy_targets": batch.targets,
            "cross_entropy_weight": self.cross_entropy_weight,
            "bias": getattr(head, "bias", None),
            "reduction": "sum",
            "scale": scale,
        }
        if self.accumulate_head_gradient and torch.is_grad_enabled():
            if head.weight.grad is None:
                head.weight.grad = torch.zeros_like(head.weight)
            options["head_gradient"] = head.weight.grad
        if self.divergence == "forward-kl":
            return sparse_kd_terms(
                hidden_NH, head.weight, *labels, residual=self.residual, **options
            )
        terms: LossTerms = sparse_divergence_terms(
            hidden_NH, head.weight, *labels, divergence=self.divergence, **options
        )
        return terms


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
