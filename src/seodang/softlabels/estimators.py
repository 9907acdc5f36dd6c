"""Estimators: which token ids and weights stand for the teacher's next-token distribution.

With p the teacher's distribution, a soft label is a set of ids with weights w, and the student's
loss is -sum(w log q):

- ``top-k``: the k largest p, exact. Biased: the tail is ignored.
- ``residual``: the same entries; the loss adds one bucket for the rest (`residual=True` in
  :func:`seodang.student.losses.sparse_kd_loss`). A lower bound of the full divergence.
- ``sampled``: N independent draws from p, w = count / N. Unbiased, variance p(1-p)/N per id
  (random-sampling KD, arXiv 2503.16870).
- ``head-tail``: with a threshold t, every id of p >= t, exact (the head); of the others each is
  kept with probability p/t and then has the weight t. Unbiased, variance p(t-p) per id below t
  and 0 above it, which for its expected number of ids, sum(min(1, p/t)), is the least that any
  unbiased choice has (threshold sampling: Duffield, Lund and Thorup, J. ACM 54(6), 2007). Which
  ids are kept is spread evenly along a sequence, see :func:`spread`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seodang.recipe import EstimatorName

BIASED: frozenset[EstimatorName] = frozenset({"top-k", "residual"})
_BLOCK = 256  # ids whose mass is summed before a draw is located among them
_ONE = 1 << 30  # a kept id, in the fixed-point numbers of `spread`

Parameters = dict[str, int | float]


@dataclass(frozen=True)
class Entries:
    """Soft labels of N positions before they are packed.

    ``counts`` (N,) entries of each position; then, for all positions in turn, ``ids`` (nnz,) and
    their loss ``weights`` (nnz,). ``head_mass`` (N,) is the probability of the exact entries
    together, ``entropy`` (N,) the teacher's, in nats.
    """

    counts: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float64]
    head_mass: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]

    @classmethod
    def concatenate(cls, parts: list[Entries]) -> Entries:
        """The entries of several runs of positions, in order."""
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("counts", "ids", "weights", "head_mass", "entropy")
            )
        )


class Estimation:
    """One estimator at work on the positions of one sequence, in their order.

    ``generator`` gives every random number; the same numbers and the same logits give the same
    entries however the positions are cut into calls.
    """

    def __init__(
        self,
        estimator: EstimatorName,
        parameters: Parameters,
        vocab_size: int,
        generator: np.random.Generator,
    ) -> None:
        self.estimator = estimator
        self.parameters = parameters
        self.generator = generator
        self._phase_V: npt.NDArray[np.int32] | torch.Tensor = np.empty(0, np.int32)
        if estimator == "head-tail":
            self._phase_V = generator.integers(0, _ONE, vocab_size, np.int32)

    def __call__(self, logits_NV: torch.Tensor) -> Entries:
        """The entries of the next positions, from the teacher's logits (positions, vocabulary)."""
        p_NV = torch.softmax(logits_NV, dim=-1)
        rows, ids, weights = self._entries(p_NV)
        n = len(p_NV)
        exact = np.ones(len(rows), bool)
        if self.estimator == "sampled":
            exact[:] = False
        elif self.estimator == "head-tail":
            exact = weights >= self.parameters["threshold"]
            weights = np.maximum(weights, self.parameters["threshold"])
        return Entries(
            counts=np.bincount(rows, minlength=n).astype(np.int64),
            ids=ids.astype(np.int32),
            weights=weights,
            head_mass=np.bincount(rows, weights * exact, minlength=n).astype(np.float32),
            entropy=entropy(logits_NV, p_NV).cpu().numpy(),
        )

    def _entries(self, p_NV: torch.Tensor) -> tuple[npt.NDArray[Any], ...]:
        """Rows, ids and p (of ``sampled``: count / N) of the entries, by row."""
        n, v = p_NV.shape
        if self.estimator == "sampled":
            draws = int(self.parameters["draws"])
            ids_ND = draw(p_NV, self.generator.random((n, draws)))
            flat = (np.arange(n)[:, None] * v + ids_ND).reshape(-1)
            pairs, counts = np.unique(flat, return_counts=True)
            return (*np.divmod(pairs, v), counts / draws)
        if self.estimator == "head-tail":
            if isinstance(self._phase_V, np.ndarray) and p_NV.device.type != "cpu":
                self._phase_V = torch.from_numpy(self._phase_V).to(p_NV.device)
            pairs = spread(p_NV, float(self.parameters["threshold"]), self._phase_V)
            index = torch.from_numpy(pairs).to(p_NV.device)
            p = p_NV.reshape(-1)[index].cpu().numpy().astype(np.float64)
            return (*np.divmod(pairs, v), p)
        k = min(int(self.parameters["k"]), v)
        p_NK, ids_NK = torch.topk(p_NV, k, dim=-1)
        p = p_NK.reshape(-1).cpu().numpy().astype(np.float64)
        return np.repeat(np.arange(n), k), ids_NK.reshape(-1).cpu().numpy(), p


def entropy(logits_NV: torch.Tensor, p_NV: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, (rows,), of the softmax ``p_NV`` of ``logits_NV``; NaN where those are."""
    largest_N, at_N = logits_NV.max(dim=-1)
    p_max_N = p_NV.gather(-1, at_N[:, None])[:, 0]
    found_N = largest_N - p_max_N.log() - torch.linalg.vecdot(p_NV, logits_NV)
    if not bool(found_N.isfinite().all()):  # a logit of minus infinity, times a p of zero
        rows = ~found_N.isfinite()
        found_N[rows] = torch.special.entr(p_NV[rows]).sum(-1)
    clamped_N: torch.Tensor = found_N.clamp_(min=0.0)
    return clamped_N


def spread(
    p_NV: torch.Tensor, threshold: float, phase_V: npt.NDArray[np.int32] | torch.Tensor
) -> npt.NDArray[np.int64]:
    """Which ids threshold sampling keeps, spread evenly along the positions.

    Each id carries a phase, uniform in [0, 1) at the start of a sequence. A position adds p/t to
    it; when it reaches 1 the id is kept there and the phase loses 1. So an id is kept at any one
    position with probability min(1, p/t) exactly, and along the sequence as often as the sum of
    these, rounded up or down: systematic sampling along the text (error diffusion). The hidden
    states of neighbouring positions have much in common, so these errors cancel in the gradient.

    Args:
        p_NV: (positions, vocabulary) probabilities.
        threshold: t.
        phase_V: (vocabulary,) int32, in units of 2^-30; advanced in place. A NumPy array for
            probabilities on the CPU, else a tensor on their device.

    Returns:
        Indices into the flattened ``p_NV``, rising.

    Phases are fixed-point numbers: a p below 2^-30 t counts as 0.
    """
    steps_NV = (p_NV * (_ONE / threshold)).clamp_(max=_ONE).int()
    kept_NV = torch.empty(p_NV.shape, dtype=torch.bool, device=p_NV.device)
    if isinstance(phase_V, np.ndarray):  # on a CPU NumPy's loops are several times faster here
        steps, kept = steps_NV.numpy(), kept_NV.numpy()
        for row in range(len(steps)):
            np.add(phase_V, steps[row], out=phase_V)
            np.greater_equal(phase_V, _ONE, out=kept[row])
            np.bitwise_and(phase_V, _ONE - 1, out=phase_V)
        return np.flatnonzero(kept)
    for row in range(len(steps_NV)):
        phase_V += steps_NV[row]
        torch.ge(phase_V, _ONE, out=kept_NV[row])
        phase_V &= _ONE - 1
    return kept_NV.reshape(-1).nonzero()[:, 0].cpu().numpy()


def draw(mass_NV: torch.Tensor, uniforms_ND: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Independent draws from unnormalised distributions, by inversion.

    Args:
        mass_NV: (rows, ids) non-negative, with some mass in every row.
        uniforms_ND: (rows, draws) in [0, 1).

    Returns:
        ids (rows, draws).

    The cumulative sum is taken over blocks of ids first and inside the chosen blocks only then,
    in float64: a full cumulative sum over the vocabulary costs more than the output head.
    """
    n, v = mass_NV.shape
    padded = torch.nn.functional.pad(mass_NV, (0, -v % _BLOCK)).view(n, -(-v // _BLOCK), _BLOCK)
    block_NB = padded.sum(-1, dtype=torch.float64)
    upto_NB = block_NB.cumsum(-1)
    target_ND = torch.from_numpy(uniforms_ND).to(mass_NV.device) * upto_NB[:, -1:]
    chosen_ND = torch.searchsorted(upto_NB, target_ND, right=True)
    last_N = (block_NB > 0).int().mul(torch.arange(1, block_NB.shape[1] + 1).to(block_NB.device))
    chosen_ND = torch.minimum(chosen_ND, last_N.argmax(-1)[:, None])
    before_ND = upto_NB.gather(-1, chosen_ND) - block_NB.gather(-1, chosen_ND)
    rows = torch.arange(n, device=mass_NV.device)[:, None]
    inside_NDK = padded[rows, chosen_ND].double().cumsum(-1)
    left_ND1 = (target_ND - before_ND)[..., None]
    inside_NDK = inside_NDK.contiguous()
    within_ND = torch.searchsorted(inside_NDK, left_ND1, right=True)[..., 0]
    # Rounding can carry a target past the block's last id that has mass: take that id.
    largest_ND = torch.searchsorted(inside_NDK, inside_NDK[..., -1:].contiguous())[..., 0]
    ids_ND = chosen_ND * _BLOCK + torch.minimum(within_ND, largest_ND)
    return ids_ND.cpu().numpy()
