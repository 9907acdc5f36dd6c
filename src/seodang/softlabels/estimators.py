"""Estimators: which token ids and weights stand for the teacher's next-token distribution.

With p the teacher's distribution, a soft label is a set of ids with weights w, and the student's
loss is -sum(w log q):

- ``top-k``: the k largest p, exact. Biased: the tail is ignored.
- ``residual``: the same entries; the loss adds one bucket for the rest (`residual=True` in
  :func:`seodang.student.losses.sparse_kd_loss`). A lower bound of the full divergence.
- ``sampled``: N independent draws from p, w = count / N. Unbiased, variance p(1-p)/N per id
  (random-sampling KD, arXiv 2503.16870).
- ``head-tail``: the h largest p, exact, and m independent draws from the rest, each of weight
  (1 - P_head) / m. Unbiased, with a lower error than ``sampled`` at the same number of ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from seodang.recipe import EstimatorName

BIASED: frozenset[EstimatorName] = frozenset({"top-k", "residual"})
_BLOCK = 256  # ids whose mass is summed before a draw is located among them


@dataclass(frozen=True)
class Entries:
    """Soft labels of N positions before they are packed.

    ``counts`` (N,) entries of each position; then, for all positions in turn, ``ids`` (nnz,),
    the teacher's probability ``p`` (nnz,) of each and the number of ``draws`` (nnz,) that hit it,
    0 for an exact entry. ``head_mass`` (N,) is the probability of the exact entries together,
    ``entropy`` (N,) the teacher's, in nats.
    """

    counts: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    p: npt.NDArray[np.float32]
    draws: npt.NDArray[np.int64]
    head_mass: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]

    @classmethod
    def concatenate(cls, parts: list[Entries]) -> Entries:
        """The entries of several runs of positions, in order."""
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("counts", "ids", "p", "draws", "head_mass", "entropy")
            )
        )


def uniforms_needed(estimator: EstimatorName, parameters: dict[str, int]) -> int:
    """How many uniform random numbers one position consumes."""
    return parameters["draws"] if estimator in ("sampled", "head-tail") else 0


def estimate(
    log_probs_NV: torch.Tensor,
    estimator: EstimatorName,
    parameters: dict[str, int],
    uniforms_ND: npt.NDArray[np.float64],
) -> Entries:
    """Apply an estimator to the teacher's log-probabilities.

    Args:
        log_probs_NV: (positions, vocabulary) in nats.
        estimator: its standard name.
        parameters: as :meth:`seodang.recipe.SoftLabelsConfig.parameters` gives them.
        uniforms_ND: (positions, draws) numbers in [0, 1) that decide the draws.

    Returns:
        The entries; exact ones first, by falling p, then drawn ones, by rising id.
    """
    p_NV = log_probs_NV.exp()
    entropy = torch.special.entr(p_NV).sum(-1)
    exact = {"top-k": "k", "residual": "k", "head-tail": "head"}.get(estimator)
    k = min(parameters[exact], p_NV.shape[1]) if exact else 0
    head_p, head_ids = torch.topk(p_NV, k, dim=-1)
    head_mass = head_p.sum(-1, dtype=torch.float64)
    if uniforms_ND.shape[1] == 0:
        drawn_rows = np.empty(0, np.int64)
        drawn_ids = drawn_draws = np.empty(0, np.int64)
        drawn_p = np.empty(0, np.float32)
    else:
        rest_NV = p_NV.scatter(-1, head_ids, 0.0) if k else p_NV
        ids_ND, possible_N = draw(rest_NV, uniforms_ND)
        rows = np.repeat(np.arange(len(ids_ND)), ids_ND.shape[1])
        keep = possible_N[rows]
        pairs, drawn_draws = np.unique(
            rows[keep] * p_NV.shape[1] + ids_ND.reshape(-1)[keep], return_counts=True
        )
        drawn_rows, drawn_ids = np.divmod(pairs, p_NV.shape[1])
        index = torch.from_numpy(pairs).to(p_NV.device)
        drawn_p = p_NV.reshape(-1)[index].cpu().numpy()
    n = p_NV.shape[0]
    all_rows = np.concatenate([np.repeat(np.arange(n), k), drawn_rows])
    order = np.argsort(all_rows, kind="stable")
    return Entries(
        counts=np.bincount(all_rows, minlength=n).astype(np.int64),
        ids=np.concatenate([head_ids.reshape(-1).cpu().numpy(), drawn_ids])[order].astype(np.int32),
        p=np.concatenate([head_p.reshape(-1).cpu().numpy(), drawn_p])[order].astype(np.float32),
        draws=np.concatenate([np.zeros(n * k, np.int64), drawn_draws])[order].astype(np.int64),
        head_mass=head_mass.cpu().numpy().astype(np.float32),
        entropy=entropy.cpu().numpy().astype(np.float32),
    )


def draw(
    mass_NV: torch.Tensor, uniforms_ND: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Independent draws from unnormalised distributions, by inversion.

    Args:
        mass_NV: (rows, ids) non-negative.
        uniforms_ND: (rows, draws) in [0, 1).

    Returns:
        ids (rows, draws), and for each row whether it has any mass to draw from.

    The cumulative sum is taken over blocks of ids first and inside the chosen blocks only then,
    in float64: a full cumulative sum over the vocabulary costs more than the output head.
    """
    n, v = mass_NV.shape
    padded = torch.nn.functional.pad(mass_NV, (0, -v % _BLOCK)).view(n, -(-v // _BLOCK), _BLOCK)
    block_NB = padded.sum(-1, dtype=torch.float64)
    upto_NB = block_NB.cumsum(-1)
    total_N = upto_NB[:, -1]
    target_ND = torch.from_numpy(uniforms_ND).to(mass_NV.device) * total_N[:, None]
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
    return ids_ND.cpu().numpy(), (total_N > 0).cpu().numpy()


def weights(
    estimator: EstimatorName,
    parameters: dict[str, int],
    counts: npt.NDArray[np.int64],
    p: npt.NDArray[np.float32],
    draws: npt.NDArray[np.int64],
    head_mass: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Loss weights (nnz,) of stored entries; shapes as in :class:`Entries`.

    The exact entries of a position are scaled to sum to its ``head_mass``, which is stored more
    finely than they are.
    """
    if estimator == "sampled":
        return (draws / parameters["draws"]).astype(np.float32)
    rows = np.repeat(np.arange(len(counts)), counts)
    exact = np.where(draws == 0, p, 0).astype(np.float64)
    total = np.bincount(rows, exact, minlength=len(counts)).astype(np.float64)
    scale = np.divide(head_mass, total, out=np.zeros_like(total), where=total > 0)
    out = exact * scale[rows]
    if estimator == "head-tail":
        hits = np.bincount(rows, draws, minlength=len(counts)).astype(np.float64)
        share = np.divide(
            1.0 - head_mass.astype(np.float64), hits, out=np.zeros_like(hits), where=hits > 0
        )
        out += draws * np.maximum(share, 0)[rows]
    return out.astype(np.float32)
