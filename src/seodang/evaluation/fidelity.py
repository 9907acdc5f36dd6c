"""How closely a model follows the teacher, measured against the teacher's full distributions.

Every figure is taken at the labelled positions of held-out documents:

- KL: mean over positions of KL(teacher || model) over the whole vocabulary, in nats.
- top-1 agreement: share of positions at which both put the same token first.
- perplexity: exp of the mean negative log-likelihood of the observed next token.
- calibration error: expected calibration error of the model's first choice against the observed
  token, with equal-width bins of confidence (Guo et al. 2017, arXiv 1706.04599, eq. 3).
- tokens per second: forward pass and output head over the same batches on this machine.

**With a trimmed vocabulary** a student predicts pieces, so that all models are compared over first
pieces: the teacher's distribution, and that of every model with the teacher's vocabulary, is
mapped by "first piece of the token" (:class:`seodang.student.trimmed.TrimmedVocabulary`). KL,
top-1 agreement and calibration error are those of first pieces then, for every model in the table
alike. Merging categories never raises a KL (data processing inequality): such a figure is at most
the KL over the whole vocabulary, and must not be compared with one. Models with the teacher's
vocabulary also get the latter, as ``full_kl``, and ``moved_mass``: their mean probability of
tokens that are spelled out, which is what the mapping can hide. Trimmed models read the text
spelled out. The likelihood of an observed token is the product of those of its pieces, and tokens
are the teacher's everywhere, so that perplexities and speeds compare.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seodang.causal_lm import CausalLM, length_batches, row_chunks
from seodang.corpus.sequences import TokenSequence, observed_tokens
from seodang.errors import WorkFailed
from seodang.evaluation.first_pieces import FirstPieces, Reading
from seodang.progress import track
from seodang.student.trimmed import TrimmedVocabulary

Float = npt.NDArray[np.float64]


@dataclass
class Fidelity:
    """Running sums of one model over positions."""

    bins: int
    positions: int = 0
    observed: int = 0
    kl: float = 0.0
    agreed: int = 0
    nll: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    full_kl: float | None = None
    moved: float = 0.0
    count: Float = field(init=False)
    confidence: Float = field(init=False)
    correct: Float = field(init=False)

    def __post_init__(self) -> None:
        self.count, self.confidence, self.correct = (np.zeros(self.bins) for _ in range(3))

    def add(
        self,
        reference_NV: torch.Tensor,
        model_NV: torch.Tensor,
        targets_N: torch.Tensor,
        nll_N: torch.Tensor,
    ) -> None:
        """Add positions: log-probabilities (N, V) of teacher and model over the same categories.

        ``targets_N`` are the observed categories, or -100; ``nll_N`` the negative log-likelihoods
        of the observed tokens, which count where there is a target.
        """
        self.kl += kl_sum(reference_NV, model_NV)
        best = model_NV.max(-1)
        self.agreed += int((best.indices == reference_NV.argmax(-1)).sum())
        self.positions += len(targets_N)
        seen = targets_N >= 0
        self.observed += int(seen.sum())
        self.nll += float(nll_N[seen].double().sum())
        confidence = best.values[seen].exp().double().cpu().numpy()
        correct = (best.indices == targets_N)[seen].cpu().numpy()
        index = np.minimum((confidence * self.bins).astype(int), self.bins - 1)
        self.count += np.bincount(index, minlength=self.bins)
        self.confidence += np.bincount(index, confidence, minlength=self.bins)
        self.correct += np.bincount(index, correct, minlength=self.bins)

    def add_full(self, teacher_NV: torch.Tensor, model_NV: torch.Tensor, moved: float) -> None:
        """Add what only a model with the teacher's vocabulary has: log-probabilities over it."""
        self.full_kl = (self.full_kl or 0.0) + kl_sum(teacher_NV, model_NV)
        self.moved += moved

    def result(self, model: CausalLM) -> dict[str, Any]:
        """The figures; raises ``WorkFailed`` if one is not finite."""
        found = {
            "kl": self.kl / self.positions,
            "top1_agreement": self.agreed / self.positions,
            "perplexity": math.exp(min(700.0, self.nll / max(1, self.observed))),
            "calibration_error": float(
                np.abs(self.confidence - self.correct).sum() / max(1, self.observed)
            ),
            "parameters": model.parameters,
            "bytes": model.weight_bytes,
            "tokens_per_second": self.tokens / self.seconds,
        }
        if self.full_kl is not None:
            found["full_kl"] = self.full_kl / self.positions
            found["moved_mass"] = self.moved / self.positions
        for name, value in found.items():
            if not math.isfinite(value):
                raise WorkFailed(f"the measured {name} is not finite: the model is broken")
        return found

    def calibration(self) -> list[dict[str, float]]:
        """Mean confidence and accuracy of every bin that is not empty."""
        return [
            {
                "confidence": float(self.confidence[i] / self.count[i]),
                "accuracy": float(self.correct[i] / self.count[i]),
                "count": int(self.count[i]),
            }
            for i in np.flatnonzero(self.count)
        ]


def partition(teacher: CausalLM, vocabulary: TrimmedVocabulary | None) -> str:
    """The categories over which models are compared, in words."""
    if vocabulary is None:
        return f"full vocabulary of {teacher.vocab_size:,}"
    return f"first pieces in {vocabulary.size:,} kept entries of {teacher.vocab_size:,}"


def measure(
    teacher: CausalLM,
    models: dict[str, CausalLM],
    sequences: Sequence[TokenSequence],
    bins: int,
    vocabulary: TrimmedVocabulary | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, float]]]]:
    """Figures and calibration bins of the teacher and of every model, on held-out sequences.

    ``sequences`` are in the teacher's tokens. ``vocabulary`` is the trimmed one of all models that
    do not have the teacher's.

    Raises ``ValueError`` if a model has neither vocabulary, ``WorkFailed`` if a figure is not
    finite.
    """
    everyone = {"teacher": teacher, **models}
    sums = {name: Fidelity(bins) for name in everyone}
    trimmed = {name for name, model in everyone.items() if model.vocab_size != teacher.vocab_size}
    for name in sorted(trimmed):
        if vocabulary is None or everyone[name].vocab_size != vocabulary.size:
            raise ValueError(
                f"{name} has {everyone[name].vocab_size} entries, the teacher "
                f"{teacher.vocab_size}: give the vocabulary that it was trimmed to"
            )
    first_pieces = None if vocabulary is None else FirstPieces(vocabulary)
    total = sum(len(sequence.labelled) for sequence in sequences)
    with track("Evaluating", total, "tok") as advance, torch.inference_mode():
        for batch in length_batches([len(s.token_ids) for s in sequences]):
            part = [sequences[i] for i in batch]
            targets = torch.from_numpy(np.concatenate([observed_tokens(s) for s in part]))
            hidden, inside_nll = {}, {}
            for name, model in everyone.items():
                started = time.perf_counter()
                reading = Reading.of(part, vocabulary if name in trimmed else None)
                hidden[name], inside_MH = reading.hidden_states(model)
                inside_nll[name] = reading.inside_nll(model, inside_MH)
                sums[name].seconds += time.perf_counter() - started
                sums[name].tokens += len(targets)
            for rows in row_chunks(len(targets), teacher.vocab_size):
                full = reference = None  # of the teacher, who stands first
                for name, model in everyone.items():
                    started = time.perf_counter()
                    log_probs = model.log_probs(hidden[name][rows])
                    sums[name].seconds += time.perf_counter() - started
                    full = log_probs if full is None else full
                    observed = targets[rows].to(log_probs.device)
                    if first_pieces is not None and name in trimmed:
                        observed = first_pieces.of_tokens(observed)
                    nll = inside_nll[name][rows] - of_observed(log_probs, observed)
                    if first_pieces is not None and name not in trimmed:
                        sums[name].add_full(full, log_probs, first_pieces.moved_mass(log_probs))
                        log_probs = first_pieces.log_probs(log_probs)
                        observed = first_pieces.of_tokens(observed)
                    reference = log_probs if reference is None else reference
                    sums[name].add(reference, log_probs, observed, nll)
            advance(len(targets))
    return (
        {name: sums[name].result(model) for name, model in everyone.items()},
        {name: sums[name].calibration() for name in everyone},
    )


def of_observed(log_probs_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of the observed categories, (N,); any value where there is none."""
    return log_probs_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]


def kl_sum(reference_NV: torch.Tensor, model_NV: torch.Tensor) -> float:
    """Sum over rows of KL(reference || model) in nats, from log-probabilities."""
    divergence_NV = reference_NV.exp() * (reference_NV - model_NV)
    return float(divergence_NV.sum(-1, dtype=torch.float64).sum())
