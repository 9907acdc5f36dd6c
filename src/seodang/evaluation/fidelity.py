"""How closely a model follows the teacher, measured against the teacher's full distributions.

Every figure is taken at the labelled positions of held-out documents:

- KL: mean over positions of KL(teacher || model) over the whole vocabulary, in nats.
- top-1 agreement: share of positions at which both put the same token first.
- perplexity: exp of the mean negative log-likelihood of the observed next token.
- calibration error: expected calibration error of the model's first choice against the observed
  token, with equal-width bins of confidence (Guo et al. 2017, arXiv 1706.04599, eq. 3).
- tokens per second: forward pass and output head over the same batches on this machine.
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
from seodang.progress import track

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
    count: Float = field(init=False)
    confidence: Float = field(init=False)
    correct: Float = field(init=False)

    def __post_init__(self) -> None:
        self.count, self.confidence, self.correct = (np.zeros(self.bins) for _ in range(3))

    def add(
        self, teacher_NV: torch.Tensor, model_NV: torch.Tensor, targets_N: torch.Tensor
    ) -> None:
        """Add positions: log-probabilities (N, V) of both, observed tokens (N,), or -100."""
        divergence_NV = teacher_NV.exp() * (teacher_NV - model_NV)
        self.kl += float(divergence_NV.sum(-1, dtype=torch.float64).sum())
        best = model_NV.max(-1)
        self.agreed += int((best.indices == teacher_NV.argmax(-1)).sum())
        self.positions += len(targets_N)
        seen = targets_N >= 0
        self.observed += int(seen.sum())
        observed_N1 = targets_N.clamp(min=0)[:, None]
        self.nll -= float(model_NV.gather(1, observed_N1)[:, 0][seen].double().sum())
        confidence = best.values[seen].exp().double().cpu().numpy()
        correct = (best.indices == targets_N)[seen].cpu().numpy()
        index = np.minimum((confidence * self.bins).astype(int), self.bins - 1)
        self.count += np.bincount(index, minlength=self.bins)
        self.confidence += np.bincount(index, confidence, minlength=self.bins)
        self.correct += np.bincount(index, correct, minlength=self.bins)

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
            "bytes": sum(p.numel() * p.element_size() for p in model.model.parameters()),
            "tokens_per_second": self.tokens / self.seconds,
        }
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


def measure(
    teacher: CausalLM,
    models: dict[str, CausalLM],
    sequences: Sequence[TokenSequence],
    bins: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, float]]]]:
    """Figures and calibration bins of the teacher and of every model, on held-out sequences."""
    everyone = {"teacher": teacher, **models}
    sums = {name: Fidelity(bins) for name in everyone}
    total = sum(len(sequence.labelled) for sequence in sequences)
    with track("Evaluating", total, "tok") as advance, torch.inference_mode():
        for batch in length_batches([len(s.token_ids) for s in sequences]):
            part = [sequences[i] for i in batch]
            targets = torch.from_numpy(np.concatenate([observed_tokens(s) for s in part]))
            hidden = {}
            for name, model in everyone.items():
                started = time.perf_counter()
                states = model.hidden_states([s.token_ids for s in part])
                hidden[name] = torch.cat(
                    [
                        h[torch.tensor(s.labelled, dtype=torch.int64)]
                        for h, s in zip(states, part, strict=True)
                    ]
                )
                sums[name].seconds += time.perf_counter() - started
                sums[name].tokens += sum(len(s.labelled) for s in part)
            for rows in row_chunks(len(targets), teacher.vocab_size):
                reference = None
                for name, model in everyone.items():
                    started = time.perf_counter()
                    log_probs = model.log_probs(hidden[name][rows])
                    sums[name].seconds += time.perf_counter() - started
                    reference = log_probs if reference is None else reference
                    sums[name].add(reference, log_probs, targets[rows].to(log_probs.device))
            advance(len(targets))
    return (
        {name: sums[name].result(model) for name, model in everyone.items()},
        {name: sums[name].calibration() for name in everyone},
    )
