"""One pass over a loss of hidden states, output head and sparse labels: value and gradients.

Let L be a loss of one position in terms of the student's log-probabilities log q_e of its stored
ids and of log r, the logarithm of the mass r on all the others. With a_e = dL/d(log q_e),
b = dL/d(log r) and t = sum(a) + b, the chain rule through the softmax gives per logit

    a_e - t q_e   on a stored id,        (b / r - t) q_j   on any other,

so that a loss is its value, a and b, all of the size of the labels (:class:`Divergence`), and the
rest is the same for all: a pass over chunks of rows with three matrix products (logits, gradient
of hidden, gradient of head), computed together in the forward call as Liger-Kernel does for
cross-entropy (arXiv 2410.10989). Inside a chunk the products go over tiles of the vocabulary small
enough that exponentiating, summing and scaling find them in the cache. There is no pass for the
maximum: a row is shifted by the logit of its heaviest stored id, so that its sum is at least that
of the label; where another logit is so much higher that the sum overflows, the chunk is done again
with the true maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from seodang.training.products import linear

CHUNK_BYTES = 80 * 2**20  # of one chunk of exponentials, however many rows there are
CHUNK_SHARE = 0.102  # of (N, V) in float32 that a chunk takes: with a tile still below 1/8
LEAST_ROWS = 96  # fewer rows in a product are slow
FEW_ROWS = 1024  # below, a chunk may take more than its share, as that is little
FEW_BYTES = 28 * 2**20  # of a chunk of so few rows
TILE = 768  # float32 ids in a tile on the CPU
OVERFLOW = 1e20  # a row's sum beyond which float32 loses the small factors
IGNORE = -100  # a cross-entropy target that does not count


class LabelledRows(NamedTuple):
    """What a divergence sees of a chunk of R rows with E entries, in float64."""

    rows: torch.Tensor  # (E,) the row of each entry
    weights: torch.Tensor  # (E,)
    log_q: torch.Tensor  # (E,)
    log_rest: torch.Tensor  # (R,) log(1 - Q), Q the student's mass on the row's stored ids

    def sum(self, values_E: torch.Tensor) -> torch.Tensor:
        """(R,) the sum of each row's entries."""
        return torch.zeros_like(self.log_rest).index_add_(0, self.rows, values_E)


class Divergence(NamedTuple):
    """A loss of one position; ``derivatives`` gives its value (R,), a (E,) and b (R,).

    ``partition`` says that the loss sets the stored ids apart from the rest: they must differ
    within a position then. Without it ``log_rest`` means nothing and b must be 0.
    """

    name: Literal["cross-entropy", "residual", "reverse-kl", "jsd"]
    partition: bool
    derivatives: Callable[[LabelledRows], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Labels(NamedTuple):
    """What is to be learnt at N positions."""

    offsets: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    targets: torch.Tensor | None
    cross_entropy_weight: float


class Gradients(NamedTuple):
    """Where the gradients of the scaled total go; None for one that is not wanted.

    ``hidden`` is overwritten, ``head`` and ``bias`` are added to.
    """

    hidden: torch.Tensor | None
    head: torch.Tensor | None
    bias: torch.Tensor | None


def run(
    divergence: Divergence,
    hidden_NH: torch.Tensor,
    head_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels: Labels,
    scale: float,
    gradients: Gradients,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of the divergence and of the cross-entropy, float64; and the ``gradients``."""
    n, v = len(hidden_NH), len(head_VH)
    compute = torch.float32 if hidden_NH.dtype == torch.float16 else hidden_NH.dtype
    distillation = cross_entropy = hidden_NH.new_zeros((), dtype=torch.float64)
    step = rows_of_chunk(n, v, compute.itemsize)
    bounds = labels.offsets[torch.arange(0, n + step, step).clamp(max=n)].tolist()
    for chunk, start in enumerate(range(0, n, step)):
        part = slice(bounds[chunk], bounds[chunk + 1])
        span = slice(start, min(start + step, n))
        x_RH = hidden_NH[span].to(compute)
        rows_E = torch.repeat_interleave(labels.offsets[span.start : span.stop + 1].diff())
        ids_E, weights_E = labels.ids[part], labels.weights[part].double()
        targets_R = None if labels.targets is None else labels.targets[span]
        tiles = _Tiles(x_RH, head_VH, bias_V)
        entries = _Places(rows_E, ids_E, tiles)
        counted_R = x_RH.new_zeros(len(x_RH), dtype=torch.bool)
        if targets_R is not None:
            counted_R = targets_R != IGNORE
            observed = _Places(counted_R.nonzero()[:, 0], targets_R[counted_R], tiles)
        else:
            observed = _Places(rows_E[:0], ids_E[:0], tiles)

        heaviest_R = _heaviest_ids(len(x_RH), rows_E, ids_E, weights_E, targets_R)
        shift_R = tiles.logits_of(heaviest_R)
        sums_R = tiles.exponentiate(shift_R, entries, observed, divergence.partition)
        if not (sums_R < OVERFLOW).all():
            shift_R = tiles.maxima()
            sums_R = tiles.exponentiate(shift_R, entries, observed, divergence.partition)

        # All logits, and with them lse, are relative to the shift.
        all_R = sums_R
        if divergence.partition:
            all_R = sums_R.index_add(0, rows_E, entries.logits.exp())
        lse_R = all_R.log()
        log_q_E = entries.logits - lse_R[rows_E]
        seen = LabelledRows(rows_E, weights_E, log_q_E, sums_R.log() - lse_R)
        value_R, a_E, b_R = divergence.derivatives(seen)
        distillation = distillation + value_R.sum()
        cross_entropy = cross_entropy + (lse_R[observed.rows] - observed.logits).sum()
        t_R = seen.sum(a_E) + b_R - labels.cross_entropy_weight * counted_R.double()
        off_R = torch.where(b_R == 0, 0.0, b_R * torch.exp(-seen.log_rest)) - t_R
        on_E = a_E - log_q_E.exp() * t_R[rows_E] if divergence.partition else a_E
        observed_T = torch.full_like(observed.logits, -labels.cross_entropy_weight)
        entries.values, observed.values = on_E * scale, observed_T * scale
        tiles.backward(off_R * scale / all_R, entries, observed, gradients, span)
    return distillation, cross_entropy


def rows_of_chunk(n: int, v: int, itemsize: int) -> int:
    """How many of ``n`` rows of ``v`` logits to take at once, so that all chunks are alike."""
    share, row = CHUNK_SHARE * 4 / itemsize, v * itemsize
    least = max(LEAST_ROWS, FEW_BYTES // row) if n < FEW_ROWS else LEAST_ROWS
    most = max(1, min(max(int(n * share), least), CHUNK_BYTES // row))
    rows = -(-n // -(-n // most)) if n else 1
    return min(most, -(-rows // 8) * 8)


def _heaviest_ids(
    count: int,
    rows_E: torch.Tensor,
    ids_E: torch.Tensor,
    weights_E: torch.Tensor,
    targets_R: torch.Tensor | None,
) -> torch.Tensor:
    """(R,) the stored id of the greatest weight, or else the observed token."""
    ids_R = ids_E.new_zeros(count) if targets_R is None else targets_R.clamp(min=0)
    greatest_R = weights_E.new_full((count,), -torch.inf)
    greatest_R.scatter_reduce_(0, rows_E, weights_E, "amax")
    heaviest_E = weights_E == greatest_R[rows_E]
    return ids_R.scatter_reduce(
        0, rows_E[heaviest_E], ids_E[heaviest_E], "amax", include_self=False
    )


class _Tiles:
    """The exponentials of a chunk of R rows, in tiles of (T ids, R rows).

    With the rows last, the shift is the bias of the product, and the product for the head's
    gradient needs no transposition.
    """

    def __init__(
        self, x_RH: torch.Tensor, head_VH: torch.Tensor, bias_V: torch.Tensor | None
    ) -> None:
        self.x_RH, self.head_VH, self.bias_V = x_RH, head_VH, bias_V
        self.tile = max(1, TILE * 4 // x_RH.itemsize) if x_RH.device.type == "cpu" else len(head_VH)
        self.starts = range(0, len(head_VH), self.tile)
        self.tiles: list[torch.Tensor] = []

    def logits_of(self, ids_R: torch.Tensor) -> torch.Tensor:
        """(R,) the logit of one id of each row."""
        logits_R = (self.x_RH * self.head_VH[ids_R].to(self.x_RH.dtype)).sum(-1)
        return logits_R if self.bias_V is None else logits_R + self.bias_V[ids_R].to(logits_R)

    def _logits(self, start: int, shift_R: torch.Tensor | None) -> torch.Tensor:
        ids = slice(start, start + self.tile)
        minus_R = None if shift_R is None else -shift_R
        logits_TR = linear(self.head_VH[ids].to(self.x_RH.dtype), self.x_RH, minus_R)
        if self.bias_V is not None:
            logits_TR += self.bias_V[ids].to(logits_TR)[:, None]
        return logits_TR

    def maxima(self) -> torch.Tensor:
        """(R,) the largest logit of each row."""
        self.tiles = []
        return torch.stack([self._logits(start, None).amax(0) for start in self.starts]).amax(0)

    def exponentiate(
        self, shift_R: torch.Tensor, entries: _Places, observed: _Places, partition: bool
    ) -> torch.Tensor:
        """(R,) float64 sums of exp(logit - shift) over all ids, or over those not stored."""
        self.tiles = []
        sums_R = torch.zeros_like(shift_R, dtype=torch.float64)
        for index, start in enumerate(self.starts):
            logits_TR = self._logits(start, shift_R)
            entries.read(index, logits_TR)
            observed.read(index, logits_TR)
            exp_TR = logits_TR.float() if logits_TR.dtype == torch.bfloat16 else logits_TR
            exp_TR.exp_()
            if partition:
                entries.clear(index, exp_TR)
            sums_R += exp_TR.sum(0)
            self.tiles.append(exp_TR.to(logits_TR.dtype))
        return sums_R

    def backward(
        self,
        factors_R: torch.Tensor,
        entries: _Places,
        observed: _Places,
        gradients: Gradients,
        span: slice,
    ) -> None:
        """Exponentials times ``factors_R``, plus the labels' values, go through the products."""
        if not any(gradient is not None for gradient in gradients):
            return
        factors_R = factors_R.to(self.x_RH.dtype)
        sums = torch.promote_types(self.x_RH.dtype, torch.float32)
        hidden_RH = torch.zeros_like(self.x_RH, dtype=sums)
        for index, start in enumerate(self.starts):
            grad_TR = self.tiles[index].mul_(factors_R)
            ids = slice(start, start + self.tile)
            entries.add(index, grad_TR)
            observed.add(index, grad_TR)
            if gradients.hidden is not None:
                hidden_RH += linear(grad_TR.T, self.head_VH[ids].to(grad_TR.dtype).T)
            if gradients.head is not None:
                gradients.head[ids] += linear(grad_TR, self.x_RH.T)
            if gradients.bias is not None:
                gradients.bias[ids] += grad_TR.sum(1, dtype=gradients.bias.dtype)
        if gradients.hidden is not None:
            gradients.hidden[span] = hidden_RH


class _Places:
    """Where the (row, id) pairs of a chunk lie in its tiles: flat, (id - start) * R + row."""

    def __init__(self, rows: torch.Tensor, ids: torch.Tensor, tiles: _Tiles) -> None:
        count = len(tiles.x_RH)
        flat, self._order = (ids * count + rows).sort()
        size = tiles.tile * count
        firsts = torch.arange(len(tiles.starts) + 1, device=ids.device) * size
        self._cuts = torch.searchsorted(flat, firsts).tolist()
        self._flat = flat % size
        self.rows = rows
        self.logits = rows.new_empty(len(rows), dtype=torch.float64)
        self.values = self.logits

    def _in(self, tile: int) -> slice:
        return slice(self._cuts[tile], self._cuts[tile + 1])

    def read(self, tile: int, logits_TR: torch.Tensor) -> None:
        """Take this tile's ``logits``."""
        part = self._in(tile)
        self.logits[self._order[part]] = logits_TR.view(-1)[self._flat[part]].double()

    def clear(self, tile: int, exp_TR: torch.Tensor) -> None:
        """Set the places to 0."""
        exp_TR.view(-1)[self._flat[self._in(tile)]] = 0

    def add(self, tile: int, grad_TR: torch.Tensor) -> None:
        """Add ``values``; of a repeated pair, all."""
        part = self._in(tile)
        grad_TR.view(-1).index_add_(0, self._flat[part], self.values[self._order[part]].to(grad_TR))
