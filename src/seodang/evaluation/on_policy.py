"""Whether the on-policy stage helped: both students on their own words, and on held-out text.

Each student answers the same held-out prompts with the same random numbers. At every token of its
own answers its divergence from the teacher is measured on the k+1 categories that the stage
trains on: the teacher's best k ids, and one bucket for the rest. That is a lower bound of the
divergence over the whole vocabulary, the same for a served teacher as for a local one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM
from seodang.corpus.build import read_documents
from seodang.evaluation.gate import check
from seodang.recipe import GateConfig, StudentConfig
from seodang.softlabels.capture import capture
from seodang.softlabels.store import SoftLabelStore
from seodang.student.divergences import sparse_divergence_terms
from seodang.student.on_policy import answers, scoring, summary
from seodang.student.packing import pack
from seodang.student.train import checked, vocabulary_of

if TYPE_CHECKING:
    from seodang.softlabels.labelling import Teacher

KL_TOLERANCE = 0.02  # by which share the held-out KL may rise: reverse KL gives up some of it


def measure_on_policy(
    student: Path, teacher: Teacher, corpus: Path, config: StudentConfig
) -> dict[str, Any]:
    """The student's divergence from the teacher on its own answers to held-out prompts.

    Returns ``divergence`` (nats per token, of the kind that ``config.on_policy`` names), how many
    ``answers`` there were, of how many ``tokens``, and how many the student ``stopped`` itself.
    The same student gives the same figures.
    """
    stage = config.on_policy
    assert stage is not None
    documents = read_documents(corpus, "held_out")
    found = answers(student, teacher, documents, stage, [config.seed, 0])
    with TemporaryDirectory(prefix="seodang-") as folder:
        sequences = [item.sequence for item in found]
        labels = capture(teacher, sequences, scoring(stage), Path(folder) / "soft-labels")
        divergence = _divergence(student, SoftLabelStore(labels), stage.divergence)
    return {"divergence": divergence, **summary(found)}


@torch.inference_mode()
def _divergence(student: Path, store: SoftLabelStore, kind: Any) -> float:
    """Mean over the labelled positions of ``store``, in nats, in the student's vocabulary."""
    model, vocabulary = CausalLM.load(student), vocabulary_of(student)
    total, positions = 0.0, 0
    for index in range(len(store)):
        sequence = checked(store, index, vocabulary)
        (hidden_TH,) = model.hidden_states([sequence.token_ids])
        alone = pack([sequence]).to(model.device)
        terms = sparse_divergence_terms(
            hidden_TH[alone.rows],
            model.head_VH,
            alone.offsets,
            alone.entry_ids,
            alone.weights,
            divergence=kind,
            bias=model.bias_V,
            reduction="sum",
        )
        total += float(terms.kd_loss)
        positions += len(sequence.labelled)
    return total / positions


def helps(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the student after the on-policy stage is the better one, and why.

    Both hold ``divergence`` on their own answers, the held-out ``kl`` (nats per token), and
    whether the recipe's gate passes for them (``gate_passed``). The stage helped if the first
    fell, the second rose by no more than ``KL_TOLERANCE`` of itself, and the gate passes.
    """
    measured = (
        f"the divergence on its own words went from {before['divergence']:.4f} to "
        f"{after['divergence']:.4f}, the held-out KL from {before['kl']:.4f} to "
        f"{after['kl']:.4f} nats per token"
    )
    if not after["divergence"] < before["divergence"]:
        return False, f"not kept: {measured}; the first must fall"
    if not after["kl"] <= before["kl"] * (1 + KL_TOLERANCE):
        return False, f"not kept: {measured}; the second may rise by {KL_TOLERANCE:.0%} at most"
    if not after["gate_passed"]:
        return False, f"not kept: {measured}, but the gate fails"
    return True, f"kept: {measured}"


def judge(
    before: Artifact,
    after: Artifact,
    teacher: Teacher,
    corpus: Artifact,
    config: StudentConfig,
    figures: Mapping[str, Mapping[str, Any]],
    gate: GateConfig,
) -> dict[str, Any]:
    """``{"kept", "reason", "before", "after"}``: which of two students is to be released.

    ``figures`` are those of all models on held-out text, the students' as ``student`` (before the
    stage) and ``after_on_policy``.
    """
    found = {}
    for name, student, key in (("before", before, "student"), ("after", after, "after_on_policy")):
        passed = check({**figures, "student": figures[key]}, gate)["passed"]
        found[name] = {
            **measure_on_policy(student.path, teacher, corpus.path, config),
            "kl": figures[key]["kl"],
            "gate_passed": passed,
        }
    kept, reason = helps(found["before"], found["after"])
    return {"kept": kept, "reason": reason, **found}
